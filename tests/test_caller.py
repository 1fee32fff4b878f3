"""Reading and writing a caller's connection, beneath gunicorn's parser and response."""

import socket
import threading
from collections.abc import Iterator

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import InvalidChunkSize, NoMoreData

from notifier.serving import caller as caller_module
from notifier.serving.caller import BodyReader, Caller

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
LARGE = b"x" * 2**22  # more than the kernel's buffers hold


@pytest.fixture
def pair() -> Iterator[tuple[Caller, socket.socket]]:
    """The service's end of a connection, and the caller's socket."""
    ours, callers = socket.socketpair()
    with ours, callers:
        callers.settimeout(10)
        yield Caller(Config(), ours, ("127.0.0.1", 1), ("127.0.0.1", 2)), callers


@pytest.fixture
def conn(pair: tuple[Caller, socket.socket]) -> Caller:
    return pair[0]


@pytest.fixture
def caller(pair: tuple[Caller, socket.socket]) -> socket.socket:
    return pair[1]


def test_head_and_body_of_a_reply_are_sent_together(conn: Caller, caller: socket.socket) -> None:
    conn.sendall(b"head")
    conn.sendall(b"body")
    caller.settimeout(0.05)
    with pytest.raises(TimeoutError):
        caller.recv(100)
    conn.flush()
    assert caller.recv(100) == b"headbody"


def test_an_interim_reply_is_sent_at_once(conn: Caller, caller: socket.socket) -> None:
    conn.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert caller.recv(100).startswith(b"HTTP/1.1 100 ")


def test_a_large_reply_arrives_whole(conn: Caller, caller: socket.socket) -> None:
    conn.sendall(LARGE)
    sender = threading.Thread(target=conn.flush)
    sender.start()
    received = 0
    while received < len(LARGE):
        received += len(caller.recv(65536))
    sender.join(10)
    assert received == len(LARGE)


def test_a_caller_that_does_not_read_its_reply_is_dropped(
    conn: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "REQUEST_SECONDS", 0.1)
    conn.sendall(LARGE)
    with pytest.raises(TimeoutError):
        conn.flush()
    assert conn.socket.gettimeout() == 0


def test_a_request_is_read_without_blocking_and_the_connection_can_be_reused(
    conn: Caller, caller: socket.socket
) -> None:
    assert not conn.has_head()
    caller.sendall(HEAD[:-1])
    assert not conn.has_head()
    caller.sendall(HEAD[-1:] + b"body" + HEAD)
    assert conn.has_head()
    assert next(conn.parser).body.read() == b"body"
    assert conn.end_request(0)
    assert conn.has_read_head()  # of the next request
    assert next(conn.parser).uri == "/"


def test_a_body_must_arrive_within_the_time_of_its_request(
    conn: Caller, caller: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "REQUEST_SECONDS", 0.1)
    caller.sendall(HEAD + b"bo")
    assert conn.has_head()
    request = next(conn.parser)
    with pytest.raises(NoMoreData):
        request.body.read()


def test_an_unread_body_is_dropped_and_an_incomplete_one_ends_the_connection(
    conn: Caller, caller: socket.socket
) -> None:
    caller.sendall(HEAD + b"body" + HEAD + b"bo")
    assert conn.has_head()
    next(conn.parser)
    assert conn.end_request(0)
    next(conn.parser)
    with pytest.raises(NoMoreData):
        conn.end_request(0)


def test_an_idle_connection_expires_later_than_one_that_has_begun_a_request(
    conn: Caller, caller: socket.socket
) -> None:
    conn.expire_after(1000)
    idle = conn.expires
    caller.sendall(HEAD[:10])
    assert not conn.has_head()
    conn.expire_after(1000)
    begun = conn.expires
    assert begun < idle - 900
    conn.expire_after(1000)  # a second call does not extend the request's time
    assert conn.expires == pytest.approx(begun)


def test_malformed_chunks_raise_the_os_error_that_wsgi_libraries_expect() -> None:
    class Malformed:
        def read(self, size: int) -> bytes:
            raise InvalidChunkSize(b"x")

    with pytest.raises(NoMoreData) as raised:
        BodyReader(Malformed()).read(10)
    assert isinstance(raised.value, OSError)
