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
CONFIG = Config()
CONFIG.set("keepalive", 1000)


@pytest.fixture
def pair() -> Iterator[tuple[Caller, socket.socket]]:
    """The service's end of a connection, and the caller's socket."""
    ours, callers = socket.socketpair()
    with ours, callers:
        callers.settimeout(10)
        yield Caller(CONFIG, ours, ("127.0.0.1", 1), ("127.0.0.1", 2)), callers


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
    conn.flush(lambda: None)
    assert caller.recv(100) == b"headbody"


def test_a_large_reply_arrives_whole(conn: Caller, caller: socket.socket) -> None:
    conn.sendall(LARGE)
    sender = threading.Thread(target=conn.flush, args=(lambda: None,))
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
        conn.flush(lambda: None)
    assert conn.socket.gettimeout() == 0


def test_a_request_is_read_without_blocking_and_the_connection_can_be_reused(
    conn: Caller, caller: socket.socket
) -> None:
    assert conn.receive() is None
    caller.sendall(HEAD[:-1])
    assert conn.receive() is None
    caller.sendall(HEAD[-1:] + b"bod")
    assert conn.receive() is None
    caller.sendall(b"y" + HEAD + b"body")
    assert conn.receive().body.read() == b"body"
    assert conn.end_request()
    assert conn.has_request()
    assert conn.receive().uri == "/"


@pytest.mark.parametrize("read", [True, False])
def test_a_body_that_stops_early_is_given_to_the_application(
    conn: Caller, caller: socket.socket, *, read: bool
) -> None:
    caller.sendall(HEAD + b"bo")
    assert conn.receive() is None
    assert conn.give_up()
    request = conn.receive()
    assert not read or request.body.read() == b"bo"
    assert not conn.end_request()


def test_a_head_that_stops_early_gets_no_reply(conn: Caller, caller: socket.socket) -> None:
    caller.sendall(HEAD[:-1])
    assert conn.receive() is None
    assert not conn.give_up()


def test_an_unread_body_is_dropped(conn: Caller, caller: socket.socket) -> None:
    caller.sendall(HEAD + b"body" + HEAD + b"more")
    conn.receive()
    assert conn.end_request()
    assert conn.receive().body.read() == b"more"


def test_the_time_of_a_request_begins_with_its_first_byte(
    conn: Caller, caller: socket.socket
) -> None:
    """An empty line is none (RFC 9112, section 2.2)."""
    first_byte_by = conn.expires
    for empty in (b"", b"\r", b"\n\r\n"):
        caller.sendall(empty)
        assert conn.receive() is None
        assert conn.expires == first_byte_by
    caller.sendall(HEAD[:1])
    assert conn.receive() is None
    last_byte_by = conn.expires
    assert last_byte_by > first_byte_by
    caller.sendall(HEAD[1:] + b"bod")
    assert conn.receive() is None
    assert conn.expires == last_byte_by

    caller.sendall(b"y\r\n")
    assert conn.receive()
    assert conn.end_request()
    kept_until = conn.expires
    assert kept_until > last_byte_by + CONFIG.keepalive / 2
    caller.sendall(b"\r\n" * 3)
    assert conn.receive() is None
    assert conn.expires == kept_until
    caller.sendall(HEAD + b"body")
    assert conn.receive()


@pytest.mark.parametrize(
    ("field", "sent", "interim"),
    [
        (b"Expect: 100-Continue", b"", True),
        (b"Expect: 100-continue", b"bod", True),
        (b"Expect: 100-continue", b"body", False),
        (b"X: y", b"", False),
    ],
)
def test_a_caller_that_expects_an_interim_reply_gets_it_at_once(
    conn: Caller, caller: socket.socket, field: bytes, sent: bytes, *, interim: bool
) -> None:
    caller.sendall(HEAD[:-2] + field + b"\r\n\r\n" + sent)
    conn.receive()
    caller.settimeout(10 if interim else 0.05)
    if interim:
        assert caller.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    else:
        with pytest.raises(TimeoutError):
            caller.recv(100)


def test_malformed_chunks_raise_the_os_error_that_wsgi_libraries_expect() -> None:
    class Malformed:
        def read(self, size: int) -> bytes:
            raise InvalidChunkSize(b"x")

    with pytest.raises(NoMoreData) as raised:
        BodyReader(Malformed()).read(10)
    assert isinstance(raised.value, OSError)


def test_a_request_that_waits_for_a_thread_does_not_expire(
    conn: Caller, caller: socket.socket
) -> None:
    later = conn.expires + 1
    assert conn.has_expired(later)
    caller.sendall(HEAD[:5])
    assert not conn.has_expired(later)  # nobody has read it
    conn.receive()
    assert conn.has_expired(conn.expires + 1)
    assert not conn.has_expired(conn.expires - 1)
    caller.sendall(b"X")
    assert conn.has_expired(conn.expires + 1)  # it had its time
