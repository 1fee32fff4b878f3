"""A queue of threads by rank."""

import threading

from notifier.ranked_queue import RankedQueue
from tests.timing import within


def test_the_lowest_rank_is_called_first_and_equal_ranks_in_order() -> None:
    queue = RankedQueue()
    tickets = {name: queue.join(rank) for name, rank in [("c", 2.0), ("a", 1.0), ("b", 1.0)]}
    for name in ("a", "b", "c"):
        assert not tickets[name].wait(0)
        queue.call()
        assert tickets[name].wait(0)
    assert not queue


def test_a_thread_that_leaves_is_not_called() -> None:
    queue = RankedQueue()
    first, second, third = (queue.join(rank) for rank in (1.0, 2.0, 3.0))
    assert queue.leave(second)
    assert not queue.leave(second)
    queue.call()
    queue.call()
    assert first.wait(0)
    assert third.wait(0)
    assert not second.wait(0)


def test_a_thread_that_was_called_just_now_cannot_leave() -> None:
    queue = RankedQueue()
    ticket = queue.join(1.0)
    queue.call()
    assert not queue.leave(ticket)


def test_a_call_ends_a_wait() -> None:
    queue = RankedQueue()
    ticket = queue.join(1.0)
    threading.Timer(0.05, queue.call).start()
    with within(10):
        assert ticket.wait(60)
