"""The poller reports each readable connection once, to the thread that became idle last."""

import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from notifier.serving.poller import NOTHING, STOPPED, Poller

LONG = 10.0

Pair = tuple[socket.socket, socket.socket]


class Waiters:
    """Threads that wait; `woken` gets the number and the result of each one that returns."""

    def __init__(self, poller: Poller) -> None:
        self.woken: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._poller = poller
        self._threads: list[threading.Thread] = []

    def add(self) -> None:
        """Start a thread and return once it waits."""
        thread = threading.Thread(target=self._wait, args=[len(self._threads)])
        self._threads.append(thread)
        thread.start()
        time.sleep(0.1)

    def _wait(self, number: int) -> None:
        self.woken.put((number, self._poller.wait(LONG)))

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.fixture
def poller() -> Poller:
    return Poller()


@pytest.fixture
def waiters(poller: Poller) -> Iterator[Waiters]:
    waiters = Waiters(poller)
    yield waiters
    poller.stop()
    waiters.join()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    """Pairs of connected sockets: ours, which is non-blocking, and the peer's."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(3)]
        for ours, peers in made:
            stack.enter_context(ours).setblocking(False)
            stack.enter_context(peers)
        yield made


def test_a_connection_is_reported_once_until_it_is_armed_again(
    poller: Poller, waiters: Waiters, pairs: list[Pair]
) -> None:
    ours, peers = pairs[0]
    poller.add(ours.fileno())
    waiters.add()
    waiters.add()
    peers.send(b"x")
    assert waiters.woken.get(timeout=LONG)[1] == ours.fileno()
    peers.send(b"x")
    with pytest.raises(queue.Empty):
        waiters.woken.get(timeout=0.2)
    poller.again(ours.fileno())  # unread data is reported again
    assert waiters.woken.get(timeout=LONG)[1] == ours.fileno()


@pytest.mark.skipif(sys.platform != "linux", reason="kqueue promises no order")
def test_the_thread_that_became_idle_last_is_woken(
    poller: Poller, waiters: Waiters, pairs: list[Pair]
) -> None:
    """Its caches are warm, and a service with few callers then uses few threads."""
    for ours, _ in pairs:
        poller.add(ours.fileno())
        waiters.add()
    for (ours, peers), number in zip(pairs, (2, 1, 0), strict=True):
        peers.send(b"x")
        assert waiters.woken.get(timeout=LONG) == (number, ours.fileno())


def test_a_connection_with_another_request_comes_after_those_that_are_ready(
    poller: Poller, pairs: list[Pair]
) -> None:
    first, *others = [ours.fileno() for ours, _ in pairs]
    for ours, peers in pairs:
        poller.add(ours.fileno())
        peers.send(b"x")
    assert poller.wait(LONG) == first
    poller.after_others(first)
    assert [poller.wait(LONG) for _ in pairs] == [*others, first]


def test_a_stop_wakes_every_thread_even_one_that_waits_later(
    poller: Poller, waiters: Waiters
) -> None:
    for _ in range(3):
        waiters.add()
    poller.stop()
    assert {waiters.woken.get(timeout=LONG)[1] for _ in range(3)} == {STOPPED}
    assert poller.wait(LONG) == STOPPED
    poller.stop()


def test_a_wait_times_out(poller: Poller) -> None:
    assert poller.wait(0.01) == NOTHING
