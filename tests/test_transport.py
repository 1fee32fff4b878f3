"""One exchange: the fault of each failure, and nothing after the status line changes the outcome.

Every test runs over plain HTTP and over TLS.
"""

import gc
import itertools
import os
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from notifier.errors import TransportError
from notifier.wire import exchange as exchange_module
from notifier.wire.exchange import DRAIN_BYTES, DRAIN_SECONDS
from notifier.wire.transport import Transport
from tests.fixtures import MakeProvider, MakeTransport, Wire
from tests.posting import failure, post
from tests.scripted_provider import (
    CHUNKED,
    STATUS_LINE,
    Peer,
    Received,
    Script,
    ScriptedProvider,
    announces,
    answer,
    close,
    drips,
    floods,
    hang,
    reset,
    say_goodbye,
    sends,
)
from tests.sockets import silent
from tests.timing import eventually, within


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
def test_a_header_field_that_cannot_be_sent_unchanged_is_refused(
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
    "switches protocols": (
        sends(b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"),
        "protocol",
    ),
    "speaks another protocol": (sends(b"SSH-2.0-OpenSSH_9.6\r\n"), "protocol"),
    "answers binary garbage": (sends(bytes(range(256)) * 4), "protocol"),
    "sends a line without end": (floods(b"H" * 65536), "protocol"),
    "drips the status line": (drips(b"HTTP/1.1 200 O"), "timeout"),
    "drips interim answers": (drips(b"HTTP/1.1 100 Continue\r\n\r\n"), "timeout"),
    "sends Continue for ever": (floods(b"HTTP/1.1 100 Continue\r\n\r\n"), "protocol"),
    "drips the headers of Continue": (
        sends(b"HTTP/1.1 100 Continue\r\n", drips(b"X-A: b\r\n")),
        "timeout",
    ),
}


@pytest.mark.parametrize("name", NO_STATUS_LINE)
def test_a_provider_without_a_status_line_fails_with_its_fault_and_by_the_deadline(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script, kind = NO_STATUS_LINE[name]
    seconds = 0.4 if kind == "timeout" else 5.0
    assert failure(transport, provider.url, seconds=seconds) == kind
    assert len(provider.received) == 1
    provider.script = answer(202)
    assert post(transport, provider.url) == 202  # over a new connection
    assert provider.connections == 2


@pytest.mark.parametrize("status", [200, 201, 204, 301, 400, 404, 408, 429, 500, 503, 599])
def test_any_status_is_returned_and_nothing_is_sent_twice(
    transport: Transport, provider: ScriptedProvider, status: int
) -> None:
    provider.script = answer(status, b"", "Retry-After: 0")
    assert post(transport, provider.url) == status
    assert len(provider.received) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/1.1 200\r\n",
        b"HTTP/1.1 200 \r\n",
        b"HTTP/1.1  200 OK\r\n",
        b"HTTP/1.1\t200 OK\r\n",
        b"HTTP/1.1 200 OK\n",
        b"HTTP/1.1 200 OK\r\r\n",
        b"HTTP/1 200 OK\r\n",
        b"HTTP/2 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\nno field\r\n\r\nHTTP/1.1 200 OK\r\n",
    ],
)
def test_an_odd_status_line_is_understood_so_that_no_other_provider_delivers_again(
    transport: Transport, provider: ScriptedProvider, line: bytes
) -> None:
    provider.script = sends(line + b"Content-Length: 0\r\n\r\n")
    assert post(transport, provider.url) == 200


def test_a_status_line_that_ends_with_the_connection_is_understood(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = sends(b"HTTP/1.1 200 OK", lambda peer, _: peer.say_goodbye())
    assert post(transport, provider.url) == 200


@pytest.mark.parametrize("interim", [100, 102, 103])
def test_an_interim_answer_is_passed_over(
    transport: Transport, provider: ScriptedProvider, interim: int
) -> None:
    first = f"HTTP/1.1 {interim} Wait\r\nLink: </a>; rel=preload\r\n\r\n".encode()
    provider.script = sends(first, answer(202))
    assert post(transport, provider.url) == 202


def test_a_late_answer_after_an_interim_one_never_answers_the_next_post(
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
    "sends invalid chunks": sends(CHUNKED + b"zz\r\n"),
    "drips trailers": sends(CHUNKED + b"0\r\n", drips(b"X-A: b\r\n")),
    "switches protocols after the answer": sends(
        STATUS_LINE
        + b"Content-Length: 0\r\n\r\n"
        + b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
    ),
    "announces a close, and does not close": sends(
        STATUS_LINE + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", hang
    ),
}


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", ODD_ENDS)
def test_nothing_after_the_status_line_changes_the_outcome_or_delays_it_for_long(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script = ODD_ENDS[name]
    with within(2):
        assert post(transport, provider.url, seconds=10) == (302 if "redirects" in name else 200)
    provider.script = answer(202)
    assert post(transport, provider.url) == 202  # over a new connection
    assert (provider.connections, len(provider.received)) == (2, 2)


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("status", [302, 404, 500])
def test_the_status_line_decides_for_other_statuses_too(
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
    "the longest body that is drained": answer(200, b"x" * DRAIN_BYTES),
    "chunks": lambda peer, _: peer.send(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"),
    "a body that is not gzip despite its header": answer(200, b"{}", "Content-Encoding: gzip"),
}


@pytest.mark.parametrize("name", REUSABLE)
def test_a_connection_is_reused_after_a_complete_answer(
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


def test_a_post_to_a_provider_that_does_not_read_ends_at_the_deadline(
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


def test_sockets_and_threads_are_released(
    wire: Wire,
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
