"""When a request arrived, and which of two goes first."""

import socket
import sys
import time
from collections.abc import Iterator

import pytest

from notifier.arrival import MAX_ADVANTAGE, Arrival


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as theirs,
    ):
        ours, _ = listener.accept()
        with ours:
            yield ours, theirs


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does not tell")
def test_it_is_when_the_last_byte_arrived(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(b"x")
    time.sleep(0.3)  # the time that is measured
    theirs.sendall(b"y")
    sent = time.monotonic()
    time.sleep(0.3)
    assert Arrival.on(ours, None).time == pytest.approx(sent, abs=0.1)
    assert Arrival.on(ours, sent + 0.2).time == pytest.approx(sent + 0.2, abs=0.05)


def test_a_pause_since_the_last_reply_is_an_advantage(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.sendall(b"x")
    now = time.monotonic()
    first, paused, greedy = (Arrival.on(ours, reply) for reply in (None, now - 0.05, now))
    assert first.rank < paused.rank < greedy.rank
    for arrival in (first, Arrival.on(ours, now - 3600)):
        assert arrival.rank == pytest.approx(arrival.time - MAX_ADVANTAGE)
