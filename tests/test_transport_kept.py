"""Idle connections: when one is reused, and when a request is resent over another.

Every test runs over plain HTTP and over TLS.
"""

import errno
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from notifier.wire import streams
from notifier.wire.streams import READ_BYTES
from notifier.wire.transport import Transport
from tests.fixtures import MakeProvider, MakeTransport, Wire
from tests.posting import failure, post
from tests.scripted_provider import (
    STATUS_LINE,
    Peer,
    Received,
    Script,
    ScriptedProvider,
    answer,
    close,
    reset,
    say_goodbye,
    sends,
)
from tests.sockets import LOOPBACK
from tests.timing import eventually


@pytest.fixture
def unseen_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a close from the check before reuse, as if the peer closed just after the check."""
    look = streams.Plain.look
    monkeypatch.setattr(streams.Plain, "look", lambda plain: look(plain)._replace(is_quiet=True))


def one_answer_each(peer: Peer, _: Received) -> None:
    """Answer as if the connection stayed open, then close it."""
    peer.send(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
    peer.say_goodbye()


def closed_by_now(provider: ScriptedProvider) -> None:
    """Wait until the provider has closed all its connections."""
    eventually(lambda: not any(thread.is_alive() for thread in provider.serving()))


linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux reports acknowledged bytes"
)


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_a_connection_that_was_closed_while_idle_fails_no_request(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = one_answer_each
    for number in range(1, 6):
        assert post(transport, provider.url) == 200
        closed_by_now(provider)
        assert (len(provider.received), provider.connections) == (number, number)


def test_nothing_is_resent_if_the_kernel_does_not_report_acknowledged_bytes(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams.Plain, "look", lambda _: streams.Look(True, None))
    provider.script = together = Together(1)
    assert post(transport, provider.url) == 200
    together.closed.set()
    closed_by_now(provider)
    assert failure(transport, provider.url) == "reset"
    assert (len(provider.received), provider.connections) == (1, 1)


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_several_connections_that_were_closed_while_idle_fail_no_request(
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
    """Answers `parties` requests at the same time; closes once `closed` is set."""

    def __init__(self, parties: int) -> None:
        self._here = threading.Barrier(parties, timeout=10)
        self.closed = threading.Event()

    def __call__(self, peer: Peer, _: Received) -> None:
        self._here.wait()
        peer.send(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
        self.closed.wait(10)
        peer.say_goodbye()


@pytest.mark.parametrize("how", [close, reset])
def test_a_request_that_was_read_is_never_resent(
    transport: Transport, provider: ScriptedProvider, how: Script
) -> None:
    assert post(transport, provider.url) == 200
    provider.script = how
    assert failure(transport, provider.url) == "reset"
    assert (len(provider.received), provider.connections) == (2, 1)


def test_a_request_whose_connection_is_reset_is_not_resent(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reset may come from a peer that has read all of the request."""
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


def test_an_acknowledged_request_is_not_resent_after_a_close_and_a_reset(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIN and then an RST suggest that it was not read; the acknowledged bytes disprove it."""
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
def test_a_connection_is_reused_only_if_the_end_of_the_answer_is_clear(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    text, kept = KEPT[name]
    provider.script = sends(text, lambda *_: None)
    statuses = [post(transport, provider.url) for _ in range(3)]
    assert set(statuses) <= {200, 204, 304}
    assert (len(provider.received), provider.connections) == (3, 1 if kept else 3)


def test_data_after_an_answer_is_not_taken_for_the_next_answer(
    transport: Transport, provider: ScriptedProvider
) -> None:
    """Over TLS the rest has left the socket: only the TLS layer knows that it is there."""
    stray = STATUS_LINE + b"Content-Length: 0\r\n\r\n"
    head = STATUS_LINE + b"Content-Length: 8000\r\nX-Fill: "
    first = head + b"x" * (READ_BYTES - len(head) - 4 - 8000) + b"\r\n\r\n" + bytes(8000)
    assert len(first) == READ_BYTES  # as much as is read at once
    provider.script = lambda peer, _: peer.send_together(first + stray)
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
    make_transport: MakeTransport, make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an endpoint that is never called again."""
    retired, other, transport = make_provider(), make_provider(), make_transport()
    assert post(transport, retired.url) == 200
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 31)
    monkeypatch.setattr("notifier.wire.transport.time", later)
    assert post(transport, other.url) == 200
    closed_by_now(retired)


@pytest.mark.usefixtures("unseen_closing")
def test_a_peer_that_stops_sending_but_still_reads_does_not_get_the_request_again(
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


def test_a_request_over_a_new_connection_that_closes_is_not_resent(
    transport: Transport, provider: ScriptedProvider
) -> None:
    provider.script = sends(STATUS_LINE + b"Connection: close\r\n\r\n")
    assert post(transport, provider.url) == 200
    provider.eager, provider.script = True, say_goodbye  # reads nothing
    assert failure(transport, provider.url) == "reset"
    assert provider.connections == 2


@linux_only
@pytest.mark.usefixtures("unseen_closing")
def test_a_resend_fails_if_no_other_connection_can_be_made(
    transport: Transport, wire: Wire
) -> None:
    with ScriptedProvider(one_answer_each, tls=wire[1]) as provider:
        assert post(transport, provider.url) == 200
        closed_by_now(provider)
    assert failure(transport, provider.url) == "connect"


def test_a_reused_connection_keeps_to_the_deadline_of_the_next_request(
    transport: Transport, provider: ScriptedProvider
) -> None:
    def reads_one(peer: Peer, received: Received) -> None:
        answer()(peer, received)
        peer.hang()

    provider.script = reads_one
    assert post(transport, provider.url, seconds=30) == 200
    assert failure(transport, provider.url, b"x" * 8 * 1024**2, seconds=0.4) == "timeout"


class Exhausted(socket.socket):
    """A socket whose kernel has buffers for `sends` sends of the transport, and then for none."""

    sends = 0

    def send(self, data: Any, flags: int = 0) -> int:
        if Exhausted.sends <= 0:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        Exhausted.sends -= 1
        return super().send(data[:1000], flags)


@pytest.mark.parametrize(("sends", "fault"), [(0, "shortage"), (1, "protocol")])
def test_a_shortage_is_certain_to_have_sent_nothing_only_before_the_first_byte(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    monkeypatch: pytest.MonkeyPatch,
    sends: int,
    fault: str,
) -> None:
    provider, transport = make_provider(), make_transport()
    monkeypatch.setattr(Exhausted, "sends", sends)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Exhausted)
        assert failure(transport, provider.url, bytes(10_000), seconds=5) == fault
    assert provider.received == []


def test_a_shortage_on_a_kept_connection_is_certain_to_have_sent_nothing_too(
    transport: Transport, provider: ScriptedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert post(transport, provider.url) == 200
    with monkeypatch.context() as patch:
        patch.setattr(streams.Plain, "send", raising(errno.ENOBUFS))
        assert failure(transport, provider.url) == "shortage"
    assert post(transport, provider.url) == 200
    assert len(provider.received) == 2


def raising(code: int) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_shortage_closes_idle_connections_to_make_room_for_a_new_one(
    make_transport: MakeTransport, make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, other, transport = make_provider(), make_provider(), make_transport()
    assert post(transport, idle.url) == 200
    real, tries = streams._connect, itertools.count()

    def fail_once(*args: Any) -> streams.Plain:
        return real(*args) if next(tries) else raising(errno.EMFILE)(*args)

    monkeypatch.setattr(streams, "_connect", fail_once)
    assert post(transport, other.url) == 200
    closed_by_now(idle)


def test_a_shortage_without_idle_connections_is_not_tried_again(
    make_transport: MakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Any] = []

    def fail(*args: Any) -> None:
        tries.append(args)
        raising(errno.EMFILE)()

    monkeypatch.setattr(streams, "_connect", fail)
    assert failure(make_transport(), f"http://{LOOPBACK}:1/") == "shortage"
    assert len(tries) == 1
