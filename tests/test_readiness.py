"""Which connections can be read: each is reported once, to the thread that became idle last."""

import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from notifier.serving.readiness import NOTHING, STOPPED, Readiness

LONG = 10.0

Pair = tuple[socket.socket, socket.socket]


class Waiters:
    """Threads that wait; `woken` gets the number of each that returned, and what it got."""

    def __init__(self, readiness: Readiness) -> None:
        self.woken: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._readiness = readiness
        self._threads: list[threading.Thread] = []

    def add(self) -> None:
        """Start one, and return when it waits."""
        thread = threading.Thread(target=self._wait, args=[len(self._threads)])
        self._threads.append(thread)
        thread.start()
        time.sleep(0.1)

    def _wait(self, number: int) -> None:
        self.woken.put((number, self._readiness.wait(LONG)))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def waiters(readiness: Readiness) -> Iterator[Waiters]:
    waiters = Waiters(readiness)
    yield waiters
    readiness.stop()
    waiters.join()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Connected sockets: ours, which does not block, and the peer's."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(3)]
        for ours, peers in made:
            stack.enter_context(ours).setblocking(False)
            stack.enter_context(peers)
        yield made


def test_a_connection_is_reported_once_until_it_is_armed_again(
    readiness: Readiness, waiters: Waiters, pairs: list[Pair]
) -> None:
    ours, peers = pairs[0]
    readiness.add(ours.fileno())
    waiters.add()
    waiters.add()
    peers.send(b"x")
    assert waiters.woken.get(timeout=LONG)[1] == ours.fileno()
    peers.send(b"x")
    with pytest.raises(queue.Empty):
        waiters.woken.get(timeout=0.2)
    readiness.again(ours.fileno())  # what has not been read is reported
    assert waiters.woken.get(timeout=LONG)[1] == ours.fileno()


@pytest.mark.skipif(sys.platform != "linux", reason="kqueue promises no order")
def test_the_thread_that_became_idle_last_is_woken(
    readiness: Readiness, waiters: Waiters, pairs: list[Pair]
) -> None:
    """It has warm caches, and a service with few callers uses few threads."""
    for ours, _ in pairs:
        readiness.add(ours.fileno())
        waiters.add()
    for (ours, peers), number in zip(pairs, (2, 1, 0), strict=True):
        peers.send(b"x")
        assert waiters.woken.get(timeout=LONG) == (number, ours.fileno())


def test_a_connection_that_goes_on_at_once_comes_after_those_that_are_ready(
    readiness: Readiness, pairs: list[Pair]
) -> None:
    first, *others = [ours.fileno() for ours, _ in pairs]
    for ours, peers in pairs:
        readiness.add(ours.fileno())
        peers.send(b"x")
    assert readiness.wait(LONG) == first
    readiness.after_others(first)
    assert [readiness.wait(LONG) for _ in pairs] == [*others, first]


def test_a_stop_wakes_every_thread_and_those_that_come_later(
    readiness: Readiness, waiters: Waiters
) -> None:
    for _ in range(3):
        waiters.add()
    readiness.stop()
    assert {waiters.woken.get(timeout=LONG)[1] for _ in range(3)} == {STOPPED}
    assert readiness.wait(LONG) == STOPPED
    readiness.stop()


def test_a_wait_ends_after_its_time(readiness: Readiness) -> None:
    assert readiness.wait(0.01) == NOTHING
