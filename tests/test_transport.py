"""One exchange: how each failure reads, and that the status line decides and nothing outlasts it.

Every test runs over plain HTTP and over TLS.
"""

import gc
import itertools
import os
import ssl
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httptools
import pytest

from notifier.errors import TransportError
from notifier.wire import exchange as exchange_module
from notifier.wire import streams
from notifier.wire.exchange import DRAIN_BYTES, DRAIN_SECONDS, STATUS_ONLY, Answer, Wanted
from notifier.wire.transport import Transport
from tests.fixtures import MakeProvider, MakeTransport
from tests.posting import failure, post
from tests.scripted_provider import (
    Peer,
    Received,
    Script,
    ScriptedProvider,
    answer,
    close,
    hang,
    reset,
)
from tests.sockets import silent
from tests.timing import eventually, within

STATUS_LINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED = STATUS_LINE + b"Transfer-Encoding: chunked\r\n\r\n"


def sends(data: bytes, then: Script = close) -> Script:
    """Return a script that sends `data`, and then does something else."""

    def script(peer: Peer, received: Received) -> None:
        peer.send(data)
        then(peer, received)

    return script


def say_goodbye(peer: Peer, _: Received) -> None:
    peer.say_goodbye()


def drips(data: bytes) -> Script:
    return lambda peer, _: peer.drip(data, pause=0.02)


def floods(data: bytes) -> Script:
    """Return a script that sends `data` over and over, as fast as it can."""

    def script(peer: Peer, _: Received) -> None:
        while True:
            peer.send(data)

    return script


def announces(length: int, then: Script) -> Script:
    return sends(STATUS_LINE + f"Content-Length: {length}\r\n\r\n".encode(), then)


@pytest.fixture(params=["http", "https"])
def wire(request: pytest.FixtureRequest) -> tuple[Path | None, ssl.SSLContext | None]:
    """The CA bundle and the server's context, both None for plain HTTP."""
    if request.param == "http":
        return None, None
    bundle, context = request.getfixturevalue("certificate")
    return bundle, context


@pytest.fixture
def provider(
    make_provider: MakeProvider, wire: tuple[Path | None, ssl.SSLContext | None]
) -> ScriptedProvider:
    return make_provider(tls=wire[1])


@pytest.fixture
def transport(
    make_transport: MakeTransport, wire: tuple[Path | None, ssl.SSLContext | None]
) -> Transport:
    return make_transport(wire[0])


@pytest.fixture
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that would otherwise spend the whole second each."""
    monkeypatch.setattr(exchange_module, "DRAIN_SECONDS", 0.2)


def test_at_most_64_kib_and_one_second_are_spent_on_the_rest_of_an_answer() -> None:
    assert (DRAIN_BYTES, DRAIN_SECONDS) == (64 * 1024, 1.0)


def test_the_provider_gets_the_body_and_the_headers_as_given(
    transport: Transport, provider: ScriptedProvider
) -> None:
    assert post(transport, provider.url, b'{"a":1}', {"X-Request-Id": "abc"}) == 200
    (received,) = provider.received
    assert (received.method, received.path, received.body) == ("POST", "/send", b'{"a":1}')
    assert received.headers["content-length"] == "7"
    assert received.headers["x-request-id"] == "abc"
    assert received.headers["user-agent"] == "notifier/test"


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\n", "a\r", "\u20ac"])
def test_a_header_field_that_would_not_arrive_as_it_is_is_not_sent(
    transport: Transport, provider: ScriptedProvider, value: str
) -> None:
    with pytest.raises(TransportError) as caught:
        post(transport, provider.url, headers={"X-Key": value})
    assert caught.value.fault == "url"
    assert provider.connections == 0


NO_STATUS_LINE: dict[str, tuple[Script, str]] = {
    "hangs": (hang, "timeout"),
    "resets": (reset, "reset"),
    "closes": (close, "reset"),
    "closes within the status line": (sends(b"HTTP/1.1 ", say_goodbye), "protocol"),
    "speaks another protocol": (sends(b"SSH-2.0-OpenSSH_9.6\r\n"), "protocol"),
    "answers binary garbage": (sends(bytes(range(256)) * 4), "protocol"),
    "sends a line without end": (floods(b"H" * 65536), "protocol"),
    "drips the status line": (drips(b"HTTP/1.1 200 O"), "timeout"),
    "drips interim answers": (drips(b"HTTP/1.1 100 Continue\r\n\r\n"), "timeout"),
    "says Continue for ever": (floods(b"HTTP/1.1 100 Continue\r\n\r\n"), "protocol"),
    "drips the headers of Continue": (
        sends(b"HTTP/1.1 100 Continue\r\n", drips(b"X-A: b\r\n")),
        "timeout",
    ),
}


@pytest.mark.parametrize("name", NO_STATUS_LINE)
def test_a_provider_without_a_status_line_fails_by_its_kind_and_by_the_deadline(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script, kind = NO_STATUS_LINE[name]
    seconds = 0.4 if kind == "timeout" else 5.0
    assert failure(transport, provider.url, seconds=seconds) == kind
    assert len(provider.received) == 1
    provider.script = answer(202)
    assert post(transport, provider.url) == 202  # and the connection is not used again
    assert provider.connections == 2


@pytest.mark.parametrize("status", [200, 201, 204, 301, 400, 404, 408, 429, 500, 503, 599])
def test_the_status_is_returned_whatever_it_is_and_nothing_is_sent_twice(
    transport: Transport, provider: ScriptedProvider, status: int
) -> None:
    provider.script = answer(status, b"", "Retry-After: 0")
    assert post(transport, provider.url) == status
    assert len(provider.received) == 1


@pytest.mark.parametrize("interim", [100, 102, 103])
def test_an_interim_answer_is_not_the_answer(
    transport: Transport, provider: ScriptedProvider, interim: int
) -> None:
    first = f"HTTP/1.1 {interim} Wait\r\nLink: </a>; rel=preload\r\n\r\n".encode()
    provider.script = sends(first, answer(202))
    assert post(transport, provider.url) == 202


def test_an_answer_that_comes_after_an_interim_one_never_answers_the_next_post(
    transport: Transport, provider: ScriptedProvider
) -> None:
    posted_again = threading.Event()

    def early_hints(peer: Peer, received: Received) -> None:
        peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        posted_again.wait(1)
        answer(200)(peer, received)

    provider.script = early_hints
    with suppress(TransportError):
        post(transport, provider.url, seconds=0.3)
    provider.script = answer(503)
    threading.Timer(0.1, posted_again.set).start()
    assert post(transport, provider.url) == 503


ODD_ENDS: dict[str, Script] = {
    "hangs after the status line": sends(STATUS_LINE, hang),
    "closes after the status line": sends(STATUS_LINE),
    "resets after the status line": sends(STATUS_LINE, reset),
    "drips headers": sends(STATUS_LINE, drips(b"X-A: b\r\n")),
    "sends headers without end": sends(STATUS_LINE, floods(b"X-A: b\r\n")),
    "sends a header line without end": sends(STATUS_LINE + b"X-A: ", floods(b"a" * 65536)),
    "sends garbage for headers": sends(STATUS_LINE, floods(bytes(range(256)))),
    "hangs after the headers": announces(10, hang),
    "drips the body": announces(1000, drips(b"{}")),
    "cuts the body": announces(1000, sends(b"{}")),
    "resets within the body": announces(1000, sends(b"{}", reset)),
    "announces 4 GB": announces(4 * 1024**3, floods(b"x" * 65536)),
    "announces a byte more than is drained": announces(
        DRAIN_BYTES + 1, sends(b"x" * (DRAIN_BYTES + 1), hang)
    ),
    "announces no number": sends(STATUS_LINE + b"Content-Length: many\r\n\r\n{}"),
    "announces a negative number": sends(STATUS_LINE + b"Content-Length: -1\r\n\r\n{}"),
    "sends a body without end": sends(STATUS_LINE + b"\r\n", floods(b"x" * 65536)),
    "drips a body without end": sends(STATUS_LINE + b"\r\n", drips(b"x")),
    "sends chunks without end": sends(CHUNKED, floods(b"4\r\nabcd\r\n" * 4096)),
    "sends one chunk without end": sends(CHUNKED + b"fffffffff\r\n", floods(b"x" * 65536)),
    "redirects with a body without end": sends(
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", floods(b"x" * 65536)
    ),
    "sends no chunks": sends(CHUNKED + b"zz\r\n"),
    "drips trailers": sends(CHUNKED + b"0\r\n", drips(b"X-A: b\r\n")),
    "says that it closes, and does not": sends(
        STATUS_LINE + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", hang
    ),
}


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", ODD_ENDS)
def test_after_the_status_line_nothing_changes_the_outcome_or_delays_it_for_long(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script = ODD_ENDS[name]
    with within(2):
        assert post(transport, provider.url, seconds=10) == (302 if "redirects" in name else 200)
    provider.script = answer(202)
    assert post(transport, provider.url) == 202  # and the connection is not used again
    assert (provider.connections, len(provider.received)) == (2, 2)


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("status", [302, 404, 500])
def test_the_status_line_decides_for_other_answers_too(
    transport: Transport, provider: ScriptedProvider, status: int
) -> None:
    head = f"HTTP/1.1 {status} X\r\nLocation: http://[\r\n".encode()
    provider.script = sends(head, drips(b"X-A: b\r\n"))
    with within(2):
        assert post(transport, provider.url, seconds=10) == status


def test_the_drain_ends_at_the_deadline_if_that_comes_first(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "DRAIN_SECONDS", 30)
    provider.script = announces(1000, hang)
    with within(5):
        assert post(transport, provider.url, seconds=0.3) == 200


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize(
    "name",
    [
        "announces 4 GB",
        "sends a body without end",
        "sends chunks without end",
        "sends one chunk without end",
        "redirects with a body without end",
        "sends a header line without end",
    ],
)
def test_an_endless_answer_takes_little_memory(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script = ODD_ENDS[name]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        post(transport, provider.url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 4 * 1024**2


REUSABLE: dict[str, Script] = {
    "a small body": answer(200, b'{"id": 1}'),
    "an error": answer(503, b"busy"),
    "no body": answer(200, b""),
    "204": lambda peer, _: peer.send(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "as much as is drained": answer(200, b"x" * DRAIN_BYTES),
    "chunks": lambda peer, _: peer.send(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"),
    "no gzip in spite of its header": answer(200, b"{}", "Content-Encoding: gzip"),
}


@pytest.mark.parametrize("name", REUSABLE)
def test_the_connection_is_used_again_after(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script = REUSABLE[name]
    statuses = {post(transport, provider.url) for _ in range(3)}
    assert len(statuses) == 1
    assert (provider.connections, len(provider.received)) == (1, 3)


def test_a_connection_that_the_provider_closed_while_idle_is_replaced(
    transport: Transport, provider: ScriptedProvider
) -> None:
    closed = threading.Event()

    def answer_and_leave(peer: Peer, received: Received) -> None:
        answer(200)(peer, received)
        peer.close()
        closed.set()

    provider.script = answer_and_leave
    for _ in range(3):
        closed.clear()
        assert post(transport, provider.url) == 200
        assert closed.wait(5)
    assert (provider.connections, len(provider.received)) == (3, 3)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    transport: Transport, provider: ScriptedProvider, make_provider: MakeProvider, status: int
) -> None:
    other = make_provider()
    for location in (other.url, "/elsewhere", "http://[", ""):
        provider.script = answer(status, b"moved", f"Location: {location}")
        assert post(transport, provider.url) == status
    assert other.received == []
    assert [received.path for received in provider.received] == ["/send"] * 4


def test_cookies_are_neither_kept_nor_sent(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = answer(200, b"{}", "Set-Cookie: session=1; Path=/", "Set-Cookie: a=b")
    for _ in range(2):
        post(transport, provider.url)
    assert not any("cookie" in received.headers for received in provider.received)


def test_netrc_is_not_read(
    transport: Transport,
    provider: ScriptedProvider,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (".netrc", "_netrc", "other"):
        (tmp_path / name).write_text("machine 127.0.0.1 login someone password something\n")
        (tmp_path / name).chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    post(transport, provider.url)
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    post(transport, provider.url)
    assert not any("authorization" in received.headers for received in provider.received)


def test_a_provider_that_does_not_read_is_left_at_the_deadline(
    make_transport: MakeTransport,
) -> None:
    with silent() as port:
        body = b"x" * 32 * 1024**2
        assert failure(make_transport(), f"http://127.0.0.1:{port}/", body) == "timeout"


def test_many_threads_share_one_transport_and_each_gets_its_own_answer(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = lambda peer, received: answer(int(received.body))(peer, received)
    wrong: list[tuple[int, int]] = []

    def many(offset: int) -> None:
        for status in itertools.islice(itertools.cycle(range(200, 260)), offset, offset + 25):
            got = post(transport, provider.url, str(status).encode())
            if got != status:
                wrong.append((status, got))

    threads = [threading.Thread(target=many, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert len(provider.received) == 200


def test_sockets_and_threads_are_given_back(
    wire: tuple[Path | None, ssl.SSLContext | None],
) -> None:
    def in_use() -> tuple[int, int]:
        return len(os.listdir("/dev/fd")), threading.active_count()  # noqa: PTH208 a Path is slower

    gc.collect()
    before = in_use()
    transport = Transport(str(wire[0]) if wire[0] else None, {}, 8, "notifier/test")
    with ScriptedProvider(tls=wire[1]) as provider:
        for script in (answer(), hang, reset, close, ODD_ENDS["drips the body"], answer()):
            provider.script = script
            with suppress(TransportError):
                post(transport, provider.url, seconds=0.2)
        with suppress(TransportError):
            post(transport, "http://does-not-exist.invalid/", seconds=2)
    transport.close()
    eventually(lambda: in_use() == before, 5)


# --- connections that are closed while nobody uses them


@pytest.fixture
def unseen_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a closing go unseen before a connection is used again, as if it had just begun."""
    monkeypatch.setattr(streams.Plain, "is_quiet", lambda _: True)


def one_answer_each(peer: Peer, _: Received) -> None:
    """Answer, keep the connection by what is said, and close it."""
    peer.send(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
    peer.say_goodbye()


def closed_by_now(provider: ScriptedProvider) -> None:
    """Wait until the provider has nothing more to do with its connections."""
    eventually(lambda: not any(thread.is_alive() for thread in provider.serving()))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what arrived")


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_a_connection_that_was_closed_while_it_lay_idle_fails_nothing(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = one_answer_each
    for number in range(1, 6):
        assert post(transport, provider.url) == 200
        closed_by_now(provider)
        assert (len(provider.received), provider.connections) == (number, number)


@pytest.mark.usefixtures("unseen_closing")
def test_where_the_kernel_does_not_tell_what_arrived_nothing_is_sent_again(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.Plain, "acknowledged", lambda _: None)
    provider.script = together = Together(1)
    assert post(transport, provider.url) == 200
    together.closed.set()
    closed_by_now(provider)
    assert failure(transport, provider.url) == "reset"
    assert (len(provider.received), provider.connections) == (1, 1)


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_several_connections_that_were_closed_while_they_lay_idle_fail_nothing(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = together = Together(3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: post(transport, provider.url), range(3)))
    assert provider.connections == 3
    together.closed.set()
    closed_by_now(provider)
    provider.script = answer()
    assert post(transport, provider.url) == 200
    assert (len(provider.received), provider.connections) == (4, 4)


class Together:
    """Answers so many requests at the same moment; closes when it is told to."""

    def __init__(self, parties: int) -> None:
        self._here = threading.Barrier(parties, timeout=10)
        self.closed = threading.Event()

    def __call__(self, peer: Peer, _: Received) -> None:
        self._here.wait()
        peer.send(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
        self.closed.wait(10)
        peer.say_goodbye()


@pytest.mark.parametrize("how", [close, reset])
def test_a_request_that_was_read_is_never_sent_again(
    transport: Transport, provider: ScriptedProvider, how: Script
) -> None:
    assert post(transport, provider.url) == 200
    provider.script = how
    assert failure(transport, provider.url) == "reset"
    assert (len(provider.received), provider.connections) == (2, 1)


def test_a_request_whose_connection_is_closed_unread_by_a_reset_is_not_sent_again(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset may come from somebody who has read all of it."""
    gone, send = threading.Event(), streams.Plain.send

    def send_and_let_go(*args: Any) -> None:
        send(*args)
        gone.set()

    def stop_reading(peer: Peer, _: Received) -> None:
        peer.send(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
        gone.wait(10)
        peer.reset()

    provider.script = stop_reading
    assert post(transport, provider.url) == 200
    monkeypatch.setattr(streams.Plain, "send", send_and_let_go)
    assert failure(transport, provider.url) == "reset"
    assert (len(provider.received), provider.connections) == (1, 1)


def test_a_request_that_was_read_is_not_sent_again_though_the_connection_ends_by_a_reset(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end and then a reset look as if nobody had read it; what was acknowledged tells."""
    asked, is_reset = threading.Event(), streams.Plain.is_reset

    def ask(plain: streams.Plain, seconds: float) -> bool:
        asked.set()
        return is_reset(plain, seconds + 10)

    def end_then_reset(peer: Peer, _: Received) -> None:
        peer.stop_sending()
        asked.wait(10)
        peer.reset()

    monkeypatch.setattr(streams.Plain, "is_reset", ask)
    assert post(transport, provider.url) == 200
    provider.script = end_then_reset
    assert failure(transport, provider.url, seconds=10) == "reset"
    assert (len(provider.received), provider.connections) == (2, 1)


# --- when a connection is used again

KEPT: dict[str, tuple[bytes, bool]] = {
    "a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
    "the same length twice": (STATUS_LINE + b"Content-Length: 2\r\n" * 2 + b"\r\n{}", False),
    "two lengths": (STATUS_LINE + b"Content-Length: 9\r\nContent-Length: 2\r\n\r\n{}", False),
    "chunks": (STATUS_LINE + b"Transfer-Encoding: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
    "another encoding": (
        STATUS_LINE + b"Transfer-Encoding: gzip, chunked\r\nContent-Length: 2\r\n\r\n{}",
        False,
    ),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", True),
    "no body, in chunks": (
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
        True,
    ),
    "nothing new": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", True),
    "no length": (STATUS_LINE + b"\r\n", False),
    "a farewell": (STATUS_LINE + b"Connection: x, Close\r\nContent-Length: 0\r\n\r\n", False),
    "an old version": (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
    "an interim answer before": (
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 7\r\n\r\n"
        + STATUS_LINE
        + b"Content-Length: 0\r\n\r\n",
        True,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_connection_is_used_again_if_it_is_clear_where_the_answer_ends(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    text, kept = KEPT[name]
    provider.script = sends(text, lambda *_: None)
    statuses = [post(transport, provider.url) for _ in range(3)]
    assert set(statuses) <= {200, 204, 304}
    assert (len(provider.received), provider.connections) == (3, 1 if kept else 3)


def test_what_follows_an_answer_is_not_taken_for_the_next_one(
    transport: Transport, provider: ScriptedProvider
) -> None:
    """Both in one TLS record: what is left of it lies where nobody sees it from outside."""
    stray = STATUS_LINE + b"Content-Length: 0\r\n\r\n"
    head = STATUS_LINE + b"Content-Length: 8000\r\nX-Fill: "
    first = head + b"x" * (8192 - len(head) - 4 - 8000) + b"\r\n\r\n" + bytes(8000)
    assert len(first) == 8192  # as much as is read at once
    provider.script = sends(first + stray, lambda *_: None)
    assert post(transport, provider.url) == 200
    provider.script = answer(503)
    assert post(transport, provider.url) == 503


@pytest.mark.parametrize(("seconds", "connections"), [(29, 1), (31, 2)])
def test_a_connection_is_reused_if_it_was_idle_for_no_more_than_half_a_minute(
    transport: Transport,
    provider: ScriptedProvider,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    connections: int,
) -> None:
    assert post(transport, provider.url) == 200
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr("notifier.wire.transport.time", later)
    assert post(transport, provider.url) == 200
    assert (len(provider.received), provider.connections) == (2, connections)


def test_idle_connections_that_are_no_longer_used_are_closed(
    transport: Transport, make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an endpoint that is never asked again."""
    retired, other = make_provider(), make_provider()
    scheme = "http"
    assert post(transport, f"{scheme}://{retired.host}/") == 200
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 31)
    monkeypatch.setattr("notifier.wire.transport.time", later)
    assert post(transport, f"{scheme}://{other.host}/") == 200
    closed_by_now(retired)


@pytest.mark.usefixtures("unseen_closing")
def test_who_ends_its_side_and_reads_on_does_not_get_the_request_again(
    transport: Transport, provider: ScriptedProvider
) -> None:
    half_closed = threading.Event()

    def answer_and_stop_sending(peer: Peer, received: Received) -> None:
        if not half_closed.is_set():
            answer()(peer, received)
            peer.stop_sending()
            half_closed.set()

    provider.script = answer_and_stop_sending
    assert post(transport, provider.url) == 200
    assert half_closed.wait(10)
    assert failure(transport, provider.url) == "reset"
    assert provider.connections == 1


def test_single_bytes_are_not_read_for_ever() -> None:
    budget = streams.Budget(0.0)
    for _ in range(streams.PHASE_BYTES // streams.MIN_READ_BYTES):
        budget.spend(1)
    with pytest.raises(streams.Overlong):
        budget.spend(1)


def test_what_a_new_connection_ends_without_an_answer_is_not_sent_again(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = sends(STATUS_LINE + b"Connection: close\r\n\r\n")
    assert post(transport, provider.url) == 200
    provider.eager, provider.script = True, say_goodbye  # reads nothing
    assert failure(transport, provider.url) == "reset"
    assert provider.connections == 2


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_what_is_to_be_sent_again_fails_if_no_other_connection_can_be_made(
    transport: Transport, wire: tuple[Path | None, ssl.SSLContext | None]
) -> None:
    with ScriptedProvider(one_answer_each, tls=wire[1]) as provider:
        assert post(transport, provider.url) == 200
        closed_by_now(provider)
    assert failure(transport, provider.url) == "connect"


def test_a_kept_connection_gives_the_next_request_no_more_time_than_it_has(
    transport: Transport, provider: ScriptedProvider
) -> None:
    def reads_one(peer: Peer, received: Received) -> None:
        answer()(peer, received)
        peer.hang()

    provider.script = reads_one
    assert post(transport, provider.url, seconds=30) == 200
    assert failure(transport, provider.url, b"x" * 8 * 1024**2, seconds=0.4) == "timeout"


# --- what else of an answer can be had

WANTED = Wanted(frozenset({b"retry-after", b"x-message-id"}), body=True)


def ask(transport: Transport, url: str, wanted: Wanted = WANTED) -> Answer:
    return transport.post(url, b"{}", {}, time.monotonic() + 5, wanted)


def test_header_fields_are_returned_by_name_and_only_those_that_are_wanted(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = answer(503, b"{}", "Retry-After: 30", "X-MESSAGE-ID: abc", "X-Other: 1")
    wanted = Wanted(frozenset({b"retry-after", b"x-message-id"}))
    assert ask(transport, provider.url, wanted) == Answer(
        503, {"retry-after": "30", "x-message-id": "abc"}, None
    )
    assert ask(transport, provider.url, STATUS_ONLY) == Answer(503, {}, None)
    assert provider.connections == 1


def test_location_is_no_redirect_even_when_it_is_wanted(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = answer(302, b"{}", "Location: http://[")
    assert ask(transport, provider.url, Wanted({b"location"})) == Answer(302, {}, None)


BODIES: dict[str, tuple[Script, bytes | None]] = {
    "of a length": (answer(200, b'{"id": 1}'), b'{"id": 1}'),
    "of no length": (answer(200, b""), b""),
    "in chunks": (sends(CHUNKED + b'2\r\n{"\r\n3\r\na":\r\n0\r\n\r\n'), b'{"a":'),
    "after an interim answer": (
        sends(b"HTTP/1.1 103 Early Hints\r\nX-A: b\r\n\r\n", answer(200, b"{}")),
        b"{}",
    ),
    "up to the end": (sends(STATUS_LINE + b"\r\n{}", lambda peer, _: peer.say_goodbye()), b"{}"),
    "of 64 KiB": (answer(200, b"x" * DRAIN_BYTES), b"x" * DRAIN_BYTES),
    "that is longer": (answer(200, b"x" * (DRAIN_BYTES + 1)), None),
    "that is cut": (announces(1000, sends(b"{}")), None),
    "whose chunks are cut": (sends(CHUNKED + b"9\r\n{}"), None),
    "that drips": (announces(1000, drips(b"{}")), None),
    "without end": (sends(STATUS_LINE + b"\r\n", floods(b"x" * 65536)), None),
    "that hangs": (announces(10, hang), None),
    "that is garbage": (sends(CHUNKED + b"zz\r\n"), None),
}


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_returned_if_it_comes_whole_and_in_time(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script, body = BODIES[name]
    with within(3):
        assert ask(transport, provider.url) == Answer(200, {}, body)


def test_a_body_that_ends_with_the_connection_and_no_goodbye_is_not_whole_over_tls(
    transport: Transport,
    provider: ScriptedProvider,
    wire: tuple[Path | None, ssl.SSLContext | None],
) -> None:
    """Anybody on the way could have cut it; a plain connection cannot tell."""
    provider.script = sends(STATUS_LINE + b"\r\n{}", lambda peer, _: peer.stop_sending())
    assert ask(transport, provider.url).body == (None if wire[1] else b"{}")


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError("text"),
        OSError("text"),
        ConnectionResetError("text"),
        TimeoutError("text"),
        httptools.HttpParserError("text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_librarys_exception_becomes_a_fault_without_its_text(
    transport: Transport,
    provider: ScriptedProvider,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*_: Any) -> bytes:
        raise error

    assert post(transport, provider.url) == 200
    monkeypatch.setattr(streams.Plain, "receive", fail)
    with pytest.raises(TransportError) as caught:
        post(transport, provider.url)
    assert str(caught.value) == caught.value.fault
    assert caught.value.fault in ("timeout", "reset", "protocol")
