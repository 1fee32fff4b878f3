"""No provider can hold an attempt past its deadline, fill memory, or leak threads or descriptors.

The same assertions hold for every misbehaviour, over plain HTTP and over TLS. `test_transport` has
those for which only the outcome matters.
"""

import itertools
import os
import random
import select
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from notifier.attempts import Attempts
from notifier.breakers import Breakers, Policy
from notifier.errors import AttemptFailed
from notifier.models import Message, Provider
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
    TLSByHand,
    answer,
    close,
    drips,
    floods,
    hang,
    reset,
    sends,
)
from tests.sockets import LOOPBACK, not_answering, refusing
from tests.test_transport import ODD_ENDS
from tests.timing import eventually, within

SECONDS = 0.4  # for an attempt that ends at its deadline
ENOUGH = 5.0  # for any other attempt, even on a busy machine
MARGIN = 2.0  # extra time on a busy machine
MEMORY = 4 * 1024**2
# The most that a provider can send: we drain 64 KiB, the rest fills the kernel's buffers.
SENT = 16 * 1024**2
FOUR_GB = 4 * 1024**3

# One failure opens the breaker, so its state shows what the attempt recorded.
POLICY = Policy(
    max_half_open=1, open_seconds=60.0, min_calls=1, failure_percent=100, window_seconds=60.0
)
STATES = {"accepted": "closed", "rejected": "closed", "unknown": "open", "not_sent": "open"}

Certificate = tuple[Path, ssl.SSLContext]
ByHand = Callable[[Peer, TLSByHand], None]


@dataclass(frozen=True)
class Misbehaviour:
    """A provider's misbehaviour, and the outcome of an attempt at it."""

    script: Script
    outcome: str
    body: int = 100  # bytes of text in the notification
    eager: bool = False  # whether the script runs before the request has been read


def status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} X\r\n".encode()


def says(text: bytes, then: Script = close, outcome: str = "unknown") -> Misbehaviour:
    return Misbehaviour(sends(text, then), outcome)


def reads_slowly(peer: Peer, _: Received) -> None:
    while peer.read_some():
        peer.pause(0.05)


def early(text: bytes, then: Script, outcome: str) -> Misbehaviour:
    """Send `text` once the request begins, and do not read the rest of it."""

    def script(peer: Peer, received: Received) -> None:
        peer.read_some()
        peer.send(text)
        then(peer, received)

    return Misbehaviour(script, outcome, LARGEST, eager=True)


def accepted(name: str) -> Misbehaviour:
    """Return one of `test_transport`'s misbehaviours whose answer is accepted."""
    return Misbehaviour(ODD_ENDS[name], "accepted")


CONTINUE = status_line(100)
REPLY = STATUS_LINE + b"Content-Length: 2\r\n\r\n{}"
LAST = STATUS_LINE + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"
BIG = 8 * 1024**2  # more than the kernel's buffers hold
LARGEST = 62_000  # the longest body of an attempt that the API's limits allow

MISBEHAVIOURS = {
    # Silence and slowness.
    "accepts the connection and sends nothing": Misbehaviour(hang, "unknown", eager=True),
    "reads slowly": Misbehaviour(reads_slowly, "unknown", BIG, eager=True),
    "drips spaces into the status line": says(b"HTTP/1.1", drips(b" ")),
    "drips the headers of a 500": says(status_line(500), drips(b"X-A: b\r\n")),
    "drips the body of a 500": says(status_line(500) + b"\r\n", drips(b"x")),
    "drips the body of a 429": says(status_line(429) + b"\r\n", drips(b"x"), "not_sent"),
    "drips the body of a 404": says(status_line(404) + b"\r\n", drips(b"x"), "rejected"),
    "drips chunk sizes": says(CHUNKED, drips(b"0"), "accepted"),
    # Floods.
    "announces 4 GB": accepted("announces 4 GB"),
    "sends a body without end": accepted("sends a body without end"),
    "sends chunks without end": accepted("sends chunks without end"),
    "sends one chunk without end": accepted("sends one chunk without end"),
    "sends 4 GB with a 500": says(
        status_line(500) + f"Content-Length: {FOUR_GB}\r\n\r\n".encode(), floods(bytes(65536))
    ),
    "sends a 404 without end": says(
        status_line(404) + b"\r\n", floods(bytes(65536)), outcome="rejected"
    ),
    "sends more than it announced": says(REPLY + bytes(65536), floods(bytes(65536)), "accepted"),
    "sends headers without end": accepted("sends headers without end"),
    "sends a header line without end": accepted("sends a header line without end"),
    "sends headers of Continue without end": says(CONTINUE, floods(b"X-A: b\r\n" * 8192)),
    "sends a header line of Continue without end": says(CONTINUE, floods(b"X" * 65536)),
    "sends a status line without end": says(b"HTTP/1.1 200 ", floods(b"x" * 65536)),
    "sends spaces without end": says(b"HTTP/1.1 ", floods(b" " * 65536)),
    "sends empty lines without end": Misbehaviour(floods(b"\r\n" * 8192), "unknown"),
    "sends 103 for ever": Misbehaviour(floods(status_line(103) + b"\r\n"), "unknown"),
    # A connection that ends too early.
    "closes at once": Misbehaviour(close, "unknown", eager=True),
    "resets within the status line": says(b"HTTP/1.1 2", reset),
    "closes after Continue": says(CONTINUE + b"\r\n"),
    "resets after Continue": says(CONTINUE + b"\r\n", reset),
    "closes within a header": says(STATUS_LINE + b"X-A", outcome="accepted"),
    "resets within a header": says(STATUS_LINE + b"X-A", reset, "accepted"),
    "closes within a chunk": says(CHUNKED + b"9\r\n{}", outcome="accepted"),
    "resets within the body of a 500": says(
        status_line(500) + b"Content-Length: 9\r\n\r\n{}", reset
    ),
    "stops sending within the headers": says(
        STATUS_LINE + b"X-A: b\r\n", lambda peer, _: peer.stop_sending(), "accepted"
    ),
    "closes properly before the status line": Misbehaviour(
        lambda peer, _: peer.say_goodbye(), "unknown"
    ),
    "closes properly after the status line": says(
        STATUS_LINE, lambda peer, _: peer.say_goodbye(), "accepted"
    ),
    # An answer before the request has been read.
    "accepts before it reads": Misbehaviour(sends(LAST, hang), "accepted", eager=True),
    "fails early and reads no more": early(status_line(500) + b"\r\n", hang, "unknown"),
    "fails early and closes": early(status_line(500) + b"\r\n", close, "unknown"),
    "fails early and resets": early(status_line(500) + b"\r\n", reset, "unknown"),
    "stops reading": early(b"", hang, "unknown"),
    "closes before it has read all": early(b"", close, "unknown"),
    "resets before it has read all": early(b"", reset, "unknown"),
    # An invalid answer.
    "answers in HTTP/0.9": says(b"<html>Fine</html>"),
    "answers with NULs": says(bytes(4096)),
    "answers in UTF-16": says("HTTP/1.1 200 OK\r\n\r\n".encode("utf-16")),
    "forgets the status": says(b"HTTP/1.1\r\n\r\n"),
    "has a status of two digits": says(b"HTTP/1.1 20 OK\r\n\r\n"),
    "has a status of four digits": says(b"HTTP/1.1 2000 OK\r\n\r\n"),
    "has a status of five thousand digits": says(b"HTTP/1.1 " + b"2" * 5000 + b"\r\n\r\n"),
    "has a status below zero": says(b"HTTP/1.1 -200 OK\r\n\r\n"),
    "has a status in letters": says(b"HTTP/1.1 OK 200\r\n\r\n"),
    "switches protocols": says(status_line(101) + b"Upgrade: h2c\r\n\r\n", hang),
    "has a status line of 70 KB": says(b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n"),
    # An odd but valid answer.
    "has an unknown version": says(b"HTTP/9.9 200 OK\r\n\r\n", outcome="accepted"),
    "sends a long reason phrase": says(
        b"HTTP/1.1 200 " + b"x" * 60_000 + b"\r\n\r\n", outcome="accepted"
    ),
    "announces two lengths": says(
        STATUS_LINE + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}", hang, "accepted"
    ),
    "announces a length and chunks": says(
        STATUS_LINE + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}",
        hang,
        "accepted",
    ),
    "announces a negative length": says(
        status_line(404) + b"Content-Length: -9\r\n\r\n", floods(bytes(65536)), "rejected"
    ),
    "announces a length of five thousand digits": says(
        STATUS_LINE + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", hang, "accepted"
    ),
    "announces a negative chunk size": says(CHUNKED + b"-9\r\n{}", hang, "accepted"),
}


def floods_for_a_while(data: bytes) -> Script:
    """Return a script that floods for longer than an attempt may take, but not for ever."""

    def script(peer: Peer, _: Received) -> None:
        give_up = time.monotonic() + 2 * (SECONDS + MARGIN)
        while time.monotonic() < give_up:
            peer.send(data)

    return script


MANY_IN_A_LINE = b"a:\r" * 21_000 + b"\n"  # email.parser ends a line at every CR

MISBEHAVIOURS |= {
    "sends headers of 5 MB and an end": says(
        STATUS_LINE + (b"X-A: " + b"x" * 65_000 + b"\r\n") * 80 + b"\r\n", outcome="accepted"
    ),
    "sends 400,000 headers in 20 lines": says(
        STATUS_LINE + MANY_IN_A_LINE * 20 + b"\r\n\r\n", outcome="accepted"
    ),
    "sends 400,000 headers of Continue": says(CONTINUE + MANY_IN_A_LINE * 20 + b"\r\n\r\n"),
    "sends chunks of a byte": says(CHUNKED, floods(b"1\r\nx\r\n" * 8192), "accepted"),
    "extends chunks without end": says(
        CHUNKED, floods(b"1;" + b"x" * 60_000 + b"\r\nx\r\n"), "accepted"
    ),
    "sends trailers without end": says(
        CHUNKED + b"0\r\n", floods(b"X-A: " + b"x" * 60_000 + b"\r\n"), "accepted"
    ),
    "accepts early and reads no more": early(LAST, hang, "accepted"),
    "accepts early and closes": early(LAST, close, "accepted"),
    "refuses early and reads no more": early(
        status_line(413) + b"Connection: close\r\n\r\n", hang, "rejected"
    ),
    "refuses early and closes": early(
        status_line(413) + b"Connection: close\r\n\r\n", close, "rejected"
    ),
}

# TLS records, and bytes that are none.
ALERT = b"\x15\x03\x03\x00\x02\x02\x28"  # fatal: handshake_failure
HUGE_HELLO = b"\x16\x03\x03\x40\x00\x02\xff\xff\xff" + bytes(16380)
NOISE = random.Random(5).randbytes(65536)


def by_hand(act: ByHand, context: ssl.SSLContext) -> Script:
    return lambda peer, _: act(peer, TLSByHand(peer, context))


def greets(data: bytes, then: Script = hang) -> ByHand:
    """Answer the caller's ClientHello with `data`."""

    def act(peer: Peer, _: TLSByHand) -> None:
        peer.read_some()
        peer.send(data)
        then(peer, Received("", {}, b""))

    return act


def shakes_half(then: Script) -> ByHand:
    """Send half of the handshake's first flight, and then run `then`."""

    def act(peer: Peer, tls: TLSByHand) -> None:
        flight = tls.first_flight()
        peer.send(flight[: len(flight) // 2])
        then(peer, Received("", {}, b""))

    return act


def replies(reply: Callable[[TLSByHand], bytes], then: Script = hang) -> ByHand:
    """Complete the handshake, read the request, and send what `reply` returns."""

    def act(peer: Peer, tls: TLSByHand) -> None:
        tls.open()
        peer.send(reply(tls))
        then(peer, Received("", {}, b""))

    return act


def drips_handshake(peer: Peer, tls: TLSByHand) -> None:
    peer.drip(tls.first_flight(), pause=0.005)


def drips_records(head: bytes, rest: bytes) -> ByHand:
    """Send `head` at once, and drip the TLS record that holds `rest`."""

    def act(peer: Peer, tls: TLSByHand) -> None:
        tls.open()
        if head:
            peer.send(tls.sealed(head))
        peer.drip(tls.sealed(rest))

    return act


def corrupt(tls: TLSByHand) -> bytes:
    record = tls.sealed(REPLY)
    return record[:-1] + bytes([record[-1] ^ 1])


BAD_TLS: dict[str, tuple[ByHand, str]] = {
    "answers in plain HTTP": (greets(REPLY), "not_sent"),
    "answers with noise": (greets(NOISE), "not_sent"),
    "sends noise without end": (greets(b"", floods(NOISE)), "not_sent"),
    "sends warnings without end": (
        greets(b"", floods(b"\x15\x03\x03\x00\x02\x01\x5a" * 4096)),
        "not_sent",
    ),
    "answers the hello with an alert": (greets(ALERT), "not_sent"),
    "announces a hello of 16 MB": (greets(HUGE_HELLO, floods(bytes(65536))), "not_sent"),
    "hangs within the handshake": (shakes_half(hang), "not_sent"),
    "closes within the handshake": (shakes_half(close), "not_sent"),
    "resets within the handshake": (shakes_half(reset), "not_sent"),
    "sends an alert within the handshake": (shakes_half(sends(ALERT, hang)), "not_sent"),
    "drips the handshake": (drips_handshake, "not_sent"),
    "drips the record of the status line": (drips_records(b"", REPLY), "unknown"),
    "drips the record of the body": (drips_records(STATUS_LINE + b"\r\n", b"{}"), "accepted"),
    "sends noise after the handshake": (replies(lambda _: NOISE), "unknown"),
    "sends noise after the status line": (
        replies(lambda tls: tls.sealed(STATUS_LINE) + NOISE),
        "accepted",
    ),
    "falls back to plain HTTP": (replies(lambda _: REPLY), "unknown"),
    "answers the request with an alert": (replies(lambda tls: tls.alert()), "unknown"),
    "sends an alert after the status line": (
        replies(lambda tls: tls.sealed(STATUS_LINE) + tls.alert()),
        "accepted",
    ),
    "corrupts its answer": (replies(corrupt), "unknown"),
    "resets within a record": (replies(lambda tls: tls.sealed(REPLY)[:-9], reset), "unknown"),
    # OpenSSL skips these after its own hello, without regard to the deadline.
    "sends hello requests without end": (
        greets(b"", floods_for_a_while(b"\x16\x03\x03\x00\x04\x00\x00\x00\x00" * 7000)),
        "not_sent",
    ),
    "closes within a record": (replies(lambda tls: tls.sealed(REPLY)[:-9], close), "unknown"),
}


# The misbehaviours for which only the deadline ends an attempt.
ENDLESS = {
    "accepts the connection and sends nothing",
    "reads slowly",
    "drips spaces into the status line",
    "stops reading",
    "hangs within the handshake",
    "sends an alert within the handshake",
    "drips the record of the status line",
}


def seconds_for(name: str) -> float:
    """Return the seconds that an attempt at this misbehaviour may take."""
    if name not in ENDLESS:
        return ENOUGH
    is_big = name in MISBEHAVIOURS and MISBEHAVIOURS[name].body == BIG
    return 3 * SECONDS if is_big else SECONDS  # a big body takes time to write


@contextmanager
def nothing_kept(beyond: int = 0) -> Iterator[None]:
    """Fail if the block leaks threads or descriptors, or uses too much memory.

    Args:
        beyond: bytes that it may use on top of `MEMORY`.
    """

    def in_use() -> tuple[int, int]:
        return len(os.listdir("/dev/fd")), threading.active_count()  # noqa: PTH208 a Path is slower

    before = in_use()
    tracemalloc.start()
    try:
        at_first, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - at_first < MEMORY + beyond
    eventually(lambda: all(now <= then for now, then in zip(in_use(), before, strict=True)), 5)


def attempt(
    transport: Transport, url: str, text: Message | None = None, seconds: float = SECONDS
) -> str:
    """Make an attempt and return its outcome; fail if it takes too long."""
    provider = Provider.from_row((1, "Email", "mailer", url, "secret"))
    breakers = Breakers(POLICY)
    outcome = "accepted"
    with within(seconds + MARGIN):
        try:
            Attempts(transport, breakers, seconds).send(
                provider, text or message(), time.monotonic() + 60
            )
        except AttemptFailed as failure:
            outcome = failure.outcome
    assert breakers.of(provider.endpoint or "").state == STATES[outcome]
    return outcome


def message(size: int = 100) -> Message:
    return Message("buyer@example.com", "Hello", "x" * size)


@pytest.fixture
def transport(make_transport: MakeTransport, wire: Wire) -> Transport:
    return used(make_transport(wire[0]))


def used(transport: Transport) -> Transport:
    """Use `transport` once, so that what it makes at its first use is not taken for a leak."""
    with refusing() as port:
        failure(transport, f"https://{LOOPBACK}:{port}/")
    return transport


def check(
    transport: Transport,
    misbehaviour: Misbehaviour,
    seconds: float,
    tls: ssl.SSLContext | None = None,
    scheme: str | None = None,
) -> None:
    """Make an attempt at a misbehaving provider; check its outcome, and that nothing leaks.

    Args:
        seconds: the time that the attempt may take.
        scheme: the URL's scheme, if the provider serves another one.
    """
    text = message(misbehaviour.body)
    copies = 3 * misbehaviour.body
    with nothing_kept(copies), ScriptedProvider(misbehaviour.script, tls=tls) as provider:
        provider.eager = misbehaviour.eager
        url = f"{scheme}://{provider.endpoint}/" if scheme else provider.url
        assert attempt(transport, url, text, seconds) == misbehaviour.outcome
        assert provider.connections == 1
        assert provider.sent < SENT
        if not scheme:  # the next attempt is not affected
            provider.script, provider.eager = answer(202, b"{}", "Connection: close"), False
            assert attempt(transport, url, seconds=5) == "accepted"


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_hostile_provider_costs_no_more_than_one_attempt(
    transport: Transport, wire: Wire, name: str
) -> None:
    check(transport, MISBEHAVIOURS[name], seconds_for(name), wire[1])


@pytest.mark.usefixtures("short_drain")
@pytest.mark.parametrize("name", BAD_TLS)
def test_a_provider_with_broken_tls_costs_no_more_than_one_attempt(
    make_transport: MakeTransport, certificate: Certificate, name: str
) -> None:
    bundle, context = certificate
    act, outcome = BAD_TLS[name]
    misbehaviour = Misbehaviour(by_hand(act, context), outcome, eager=True)
    check(used(make_transport(bundle)), misbehaviour, seconds_for(name), scheme="https")


@pytest.mark.parametrize("status", [200, 500])
def test_a_dripping_body_costs_one_second_of_a_longer_attempt(
    transport: Transport, wire: Wire, status: int
) -> None:
    script = sends(status_line(status) + b"\r\n", drips(b"x"))
    with nothing_kept(), ScriptedProvider(script, tls=wire[1]) as provider, within(1 + MARGIN):
        outcome = attempt(transport, provider.url, seconds=5)
    assert outcome == ("accepted" if status == 200 else "unknown")


def test_endless_interim_answers_end_a_long_attempt_early(
    transport: Transport, provider: ScriptedProvider
) -> None:
    """Reading them without a pause would keep the interpreter from all other threads."""
    provider.script = floods(CONTINUE + b"\r\n" + status_line(103) + b"\r\n")
    with within(1 + MARGIN):
        assert attempt(transport, provider.url, seconds=10) == "unknown"


@pytest.mark.usefixtures("short_drain")
def test_many_hostile_providers_at_once_cost_no_more_than_one(
    transport: Transport, wire: Wire
) -> None:
    """Floods are left out: they would measure the speed of the machine."""
    names = [
        name
        for name in MISBEHAVIOURS
        if "without end" not in name and MISBEHAVIOURS[name].body != BIG
    ]
    outcomes: dict[str, str] = {}

    def check_one(name: str) -> None:
        with ScriptedProvider(MISBEHAVIOURS[name].script, tls=wire[1]) as provider:
            provider.eager = MISBEHAVIOURS[name].eager
            outcomes[name] = attempt(transport, provider.url, seconds=seconds_for(name))

    with nothing_kept(len(names) * 1024**2):
        threads = [threading.Thread(target=check_one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        transport.close()  # one that sent too much has left an idle connection
    assert outcomes == {name: MISBEHAVIOURS[name].outcome for name in names}


LEAVING: dict[str, Callable[[Peer], None]] = {
    "closes": Peer.close,
    "resets": Peer.reset,
    "closes properly": Peer.say_goodbye,
    "stops sending": Peer.stop_sending,
    "sends an unsolicited answer": lambda peer: peer.send(b"HTTP/1.1 408 Too late\r\n\r\n"),
}


@pytest.mark.parametrize("name", LEAVING)
def test_a_provider_that_leaves_idle_connections_fails_no_notification(
    transport: Transport, provider: ScriptedProvider, name: str
) -> None:
    """It leaves eight connections at a time, as a restarting provider does."""
    together = threading.Barrier(8, timeout=20)
    left: list[str] = []

    def answer_and_leave(peer: Peer, received: Received) -> None:
        together.wait()  # or one connection would serve all
        answer(200)(peer, received)
        answered.wait(20)
        LEAVING[name](peer)
        left.append(name)

    def notify() -> None:
        statuses.append(post(transport, provider.url))

    provider.script = answer_and_leave
    for round_ in range(1, 4):
        answered = threading.Event()
        statuses: list[int] = []
        left.clear()
        threads = [threading.Thread(target=notify) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        answered.set()
        eventually(lambda: len(left) == 8)
        assert statuses == [200] * 8
        assert (provider.connections, len(provider.received)) == (8 * round_, 8 * round_)


@pytest.mark.parametrize("leave", [close, reset], ids=["closes", "resets"])
def test_a_notification_that_the_provider_has_read_is_not_resent(
    transport: Transport, provider: ScriptedProvider, leave: Script
) -> None:
    """Not even on a reused connection, where a resend may look safe."""
    assert attempt(transport, provider.url) == "accepted"
    provider.script = leave
    assert attempt(transport, provider.url) == "unknown"
    assert (provider.connections, len(provider.received)) == (1, 2)


@pytest.mark.parametrize("by_reset", [False, True], ids=["FIN", "reset"])
def test_a_connection_closed_just_before_the_request_fails_no_notification(
    transport: Transport,
    provider: ScriptedProvider,
    monkeypatch: pytest.MonkeyPatch,
    by_reset: bool,
) -> None:
    """The provider closes it after our last check of the idle connection, before the first byte."""
    leave, went = threading.Event(), threading.Event()

    def answer_and_leave(peer: Peer, received: Received) -> None:
        answer(200)(peer, received)
        if len(provider.received) == 1:
            leave.wait(20)
            peer.reset() if by_reset else peer.close()
            went.set()

    def just_before(send: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(sock: socket.socket, *args: Any) -> Any:
            to_provider = not went.is_set() and sock.getpeername()[1] == provider.port
            if to_provider and len(provider.received) == 1:
                leave.set()
                assert went.wait(20)
                select.select([sock], [], [], 20)  # its FIN or RST has arrived
            return send(sock, *args)

        return replaced

    provider.script = answer_and_leave
    assert post(transport, provider.url) == 200
    for kind, name in itertools.product(
        (socket.socket, ssl.SSLSocket), ("send", "sendall", "sendmsg")
    ):
        monkeypatch.setattr(kind, name, just_before(getattr(kind, name)))
    assert post(transport, provider.url) == 200
    assert went.is_set()
    assert (provider.connections, len(provider.received)) == (2, 2)


def addresses(port: int, count: int = 1) -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (LOOPBACK, port))] * count


@pytest.mark.parametrize("count", [1, 50, 4000])
def test_one_deadline_covers_a_slow_look_up_and_all_addresses_that_do_not_answer(
    make_transport: MakeTransport, resolve: Callable[..., None], count: int
) -> None:
    transport, url = make_transport(), "http://mail.example.com/"

    def look_up() -> list[Any]:
        time.sleep(SECONDS / 2)
        return addresses(port, count)

    with not_answering() as port, nothing_kept():
        resolve(look_up)
        assert attempt(transport, url) == "not_sent"


def test_a_slow_look_up_leaves_the_rest_of_the_time_to_the_provider(
    make_transport: MakeTransport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    provider, transport, url = make_provider(), make_transport(), "http://mail.example.com/"

    def look_up() -> list[Any]:
        time.sleep(SECONDS / 2)
        return addresses(provider.port)

    resolve(look_up)
    provider.script = answer(200, b"", "Connection: close")
    assert attempt(transport, url, seconds=5) == "accepted"
    provider.script = hang
    assert attempt(transport, url) == "unknown"


def test_a_name_that_never_resolves_costs_a_thread_only_during_the_look_up(
    make_transport: MakeTransport, resolve: Callable[..., None]
) -> None:
    transport, released = make_transport(), threading.Event()

    def look_up() -> list[Any]:
        released.wait(30)
        return []

    resolve(look_up)
    with nothing_kept():
        try:
            for _ in range(3):
                assert attempt(transport, "http://mail.example.com/", seconds=0.2) == "not_sent"
        finally:
            released.set()
