"""The parts of an answer besides its status: the wanted header fields and a complete body.

Every test runs over plain HTTP and over TLS.
"""

import ssl
import time
from typing import Any

import pytest

from notifier.errors import TransportError
from notifier.wire import streams
from notifier.wire.exchange import DRAIN_BYTES, STATUS_ONLY, Answer, Wanted
from notifier.wire.transport import Transport
from tests.fixtures import Wire
from tests.posting import post
from tests.scripted_provider import (
    CHUNKED,
    STATUS_LINE,
    Script,
    ScriptedProvider,
    announces,
    answer,
    drips,
    floods,
    hang,
    sends,
)
from tests.timing import within

WANTED = Wanted(frozenset({b"retry-after", b"x-message-id"}), body=True)


def ask(transport: Transport, url: str, wanted: Wanted = WANTED) -> Answer:
    return transport.post(url, b"{}", {}, time.monotonic() + 5, wanted)


def test_only_the_wanted_header_fields_are_returned(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = answer(503, b"{}", "Retry-After: 30", "X-MESSAGE-ID: abc", "X-Other: 1")
    wanted = Wanted(frozenset({b"retry-after", b"x-message-id"}))
    assert ask(transport, provider.url, wanted) == Answer(
        503, {"retry-after": "30", "x-message-id": "abc"}, None
    )
    assert ask(transport, provider.url, STATUS_ONLY) == Answer(503, {}, None)
    assert provider.connections == 1


def test_location_is_not_followed_even_if_it_is_wanted(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = answer(302, b"{}", "Location: http://[")
    assert ask(transport, provider.url, Wanted({b"location"})) == Answer(302, {}, None)


ODD_FIELDS: dict[str, tuple[bytes, dict[str, str], bytes]] = {
    "a field that comes twice": (
        STATUS_LINE + b"X-Message-Id: a\r\nContent-Length: 2\r\nX-Message-Id: b\r\n\r\n{}",
        {"x-message-id": "a, b"},
        b"{}",
    ),
    "fields of an interim answer": (
        b"HTTP/1.1 103 Early Hints\r\nX-Message-Id: a\r\n\r\n"
        + STATUS_LINE
        + b"Content-Length: 2\r\n\r\n{}",
        {},
        b"{}",
    ),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\nX-Message-Id: a\r\n\r\n", {}, b"{}"),
    "another answer after it": (
        STATUS_LINE
        + b"Content-Length: 2\r\n\r\n{}"
        + STATUS_LINE
        + b"X-Message-Id: a\r\nContent-Length: 2\r\n\r\n[]",
        {},
        b"{}",
    ),
}


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_only_fields_of_the_answer_itself_are_returned(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    sent, headers, body = ODD_FIELDS[name]
    provider.script = sends(sent, lambda *_: None)
    assert ask(transport, provider.url) == Answer(200, headers, body)


BODIES: dict[str, tuple[Script, bytes | None]] = {
    "of a length": (answer(200, b'{"id": 1}'), b'{"id": 1}'),
    "of no length": (answer(200, b""), b""),
    "in chunks": (sends(CHUNKED + b'2\r\n{"\r\n3\r\na":\r\n0\r\n\r\n'), b'{"a":'),
    "after an interim answer": (
        sends(b"HTTP/1.1 103 Early Hints\r\nX-A: b\r\n\r\n", answer(200, b"{}")),
        b"{}",
    ),
    "up to the end": (sends(STATUS_LINE + b"\r\n{}", lambda peer, _: peer.say_goodbye()), b"{}"),
    "up to the end, after an interim answer of a length": (
        sends(
            b"HTTP/1.1 103 Early Hints\r\nContent-Length: 7\r\n\r\n" + STATUS_LINE + b"\r\n{}",
            lambda peer, _: peer.say_goodbye(),
        ),
        b"{}",
    ),
    "after a truncated head": (
        sends(STATUS_LINE + b"X-A: b", lambda peer, _: peer.say_goodbye()),
        None,
    ),
    "of 64 KiB": (answer(200, b"x" * DRAIN_BYTES), b"x" * DRAIN_BYTES),
    "that is longer": (answer(200, b"x" * (DRAIN_BYTES + 1)), None),
    "that is truncated": (announces(1000, sends(b"{}")), None),
    "whose chunks are truncated": (sends(CHUNKED + b"9\r\n{}"), None),
    "that drips": (announces(1000, drips(b"{}")), None),
    "without end": (sends(STATUS_LINE + b"\r\n", floods(b"x" * 65536)), None),
    "that hangs": (announces(10, hang), None),
    "that is garbage": (sends(CHUNKED + b"zz\r\n"), None),
}


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_returned_if_it_is_complete_in_time(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    provider.script, body = BODIES[name]
    with within(3):
        assert ask(transport, provider.url) == Answer(200, {}, body)


def test_a_body_that_ends_without_close_notify_is_incomplete_over_tls(
    transport: Transport,
    provider: ScriptedProvider,
    wire: Wire,
) -> None:
    """An attacker could have truncated it; on a plain connection that cannot be detected."""
    provider.script = sends(STATUS_LINE + b"\r\n{}", lambda peer, _: peer.stop_sending())
    assert ask(transport, provider.url).body == (None if wire[1] else b"{}")


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError("text"),
        OSError("text"),
        ConnectionResetError("text"),
        TimeoutError("text"),
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
