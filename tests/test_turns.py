"""Which thread takes the next ready connection, and which connection that is."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from notifier.serving import turns as turns_module
from notifier.serving.poller import STOPPED
from notifier.serving.turns import RUNNERS, Turns
from tests.timing import eventually

MANY = 40  # connections, and the maximum of threads


class Crowd:
    """Connections that are ready, and threads that each hold one until the test lets them go."""

    def __init__(self, stack: ExitStack) -> None:
        self.pairs = [socket.socketpair() for _ in range(MANY)]
        for pair in self.pairs:
            for sock in pair:
                stack.enter_context(sock)
        self.ranks = {ours.fileno(): float(MANY - i) for i, (ours, _) in enumerate(self.pairs)}
        self.taken: list[int] = []
        self.waits = False  # whether requests wait for others once they have begun
        self.go = threading.Semaphore(0)
        self.turns = Turns(MANY, self._work, lambda fd: self.ranks[fd])

    def arrive(self, *numbers: int) -> None:
        """Make connections ready."""
        for number in numbers:
            ours, theirs = self.pairs[number]
            theirs.send(b".")
            self.turns.poller.add(ours.fileno())

    def numbers(self) -> list[int]:
        """Return the connections that were taken, in order."""
        fds = [ours.fileno() for ours, _ in self.pairs]
        return [fds.index(fd) for fd in self.taken]

    def _work(self) -> None:
        while (fd := self.turns.take()) != STOPPED:
            waits = self.waits
            self.taken.append(fd)
            if waits:
                self.turns.end(calling=True)
            self.go.acquire(timeout=30)
            if not waits:
                self.turns.end()


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    with ExitStack() as stack:
        crowd = Crowd(stack)
        crowd.turns.start()
        yield crowd
        crowd.turns.stop()
        crowd.go.release(1000)
        eventually(lambda: not any(thread.name == "request" for thread in threading.enumerate()))


def test_one_request_begins_at_a_time_and_the_others_follow(crowd: Crowd) -> None:
    crowd.arrive(*range(MANY))
    for begun in range(RUNNERS, MANY + 1):
        eventually(lambda begun=begun: len(crowd.taken) == begun)
        crowd.go.release()
    assert sorted(crowd.numbers()) == list(range(MANY))


def test_requests_that_wait_for_others_do_not_keep_new_ones_from_beginning(crowd: Crowd) -> None:
    crowd.waits = True
    crowd.arrive(*range(MANY))
    eventually(lambda: len(crowd.taken) == MANY)  # each in a thread of its own


def test_queued_connections_are_taken_by_rank(crowd: Crowd) -> None:
    crowd.arrive(*range(RUNNERS))
    eventually(lambda: len(crowd.taken) == RUNNERS)
    crowd.arrive(*range(RUNNERS, MANY))
    crowd.go.release(MANY)
    eventually(lambda: len(crowd.taken) == MANY)
    assert crowd.numbers()[RUNNERS] == MANY - 1  # the last, which has the lowest rank
    first = crowd.numbers()[RUNNERS : MANY // 2]
    assert min(first) > RUNNERS + 5  # threads may overtake one another


def test_a_look_lets_one_more_begin_while_all_are_stuck(crowd: Crowd) -> None:
    crowd.arrive(*range(RUNNERS + 2))
    eventually(lambda: len(crowd.taken) == RUNNERS)
    crowd.turns.look()
    crowd.turns.look()
    eventually(lambda: len(crowd.taken) == RUNNERS + 1)
    crowd.turns.look()  # one has begun since the last
    crowd.turns.look()
    eventually(lambda: len(crowd.taken) == RUNNERS + 2)


def test_threads_end_after_a_while_but_one(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd.waits = True
    crowd.arrive(*range(10))
    eventually(lambda: len(crowd.taken) == 10)
    monkeypatch.setattr(turns_module, "THREAD_IDLE_SECONDS", 0.05)
    crowd.go.release(10)
    eventually(lambda: count() <= 2)  # one may have begun to wait before the time was short
    crowd.arrive(10, 11)
    eventually(lambda: len(crowd.taken) == 12)


def count() -> int:
    return sum(thread.name == "request" for thread in threading.enumerate())


def test_a_thread_that_cannot_start_is_done_without(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        crowd.arrive(0, 1, 2)
        for taken in (1, 2, 3):
            eventually(lambda taken=taken: len(crowd.taken) == taken)
            crowd.go.release()
    crowd.waits = True
    crowd.arrive(3, 4)
    eventually(lambda: len(crowd.taken) == 5)  # in two threads


def test_requests_that_have_begun_go_first_and_by_rank(crowd: Crowd) -> None:
    crowd.arrive(0)
    eventually(lambda: len(crowd.taken) == 1)  # it has the only turn
    resumed: list[float] = []

    def resume(rank: float) -> None:
        crowd.turns.resume(rank)
        resumed.append(rank)

    threads = [threading.Thread(target=resume, args=(rank,)) for rank in (3.0, 1.0, 2.0)]
    for number, thread in enumerate(threads, start=1):
        thread.start()
        eventually(lambda number=number: len(crowd.turns._resuming) == number)
    crowd.arrive(1)
    crowd.go.release()
    for number in range(1, 4):
        eventually(lambda number=number: len(resumed) == number)
        crowd.turns.end(calling=True)
    assert resumed == [1.0, 2.0, 3.0]
    eventually(lambda: len(crowd.taken) == 2)
    for thread in threads:
        thread.join(10)


def test_a_request_that_has_begun_goes_on_after_a_while_without_a_turn(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "PATIENCE", 0.05)
    crowd.arrive(0)
    eventually(lambda: len(crowd.taken) == 1)
    crowd.turns.resume(1.0)
    assert crowd.turns._running == RUNNERS + 1
    crowd.turns.end()
