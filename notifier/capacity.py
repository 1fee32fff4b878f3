"""Limits the notifications that run at once in this worker: others wait, or are refused."""

import heapq
import itertools
import math
import threading
import time
from typing import NamedTuple

from notifier import metrics
from notifier.arrival import Arrival
from notifier.errors import Overloaded

# Seconds from the arrival of a request that are no wait: a thread takes it and reads it.
READING_SECONDS = 0.01


class Capacity:
    """The places of a worker: `take` one, then `give` it back.

    A place that is given back goes to the request in the queue with the lowest rank, and becomes
    free only if no request waits. Shared between threads: `_free` and `_waiting`,
    guarded by `_lock`, which is never held while waiting.

    Times count from the arrival of a request, so they include the wait for a thread.

    Args:
        places: notifications that may run at once; as many more may wait.
        patience: maximum seconds to wait.
        latest: seconds after which a request gets no place, even a free one.
    """

    def __init__(self, places: int, patience: float, latest: float = math.inf) -> None:
        self._places = places
        self._patience = patience
        self._latest = latest
        self._lock = threading.Lock()
        self._free = places
        self._numbers = itertools.count()
        self._waiting: list[_Turn] = []  # a heap
        metrics.PLACES.set(places)

    def take(self, arrival: Arrival) -> None:
        """Take a place; wait in the queue if none is free.

        Raises:
            Overloaded: the queue is full, no place became free in time, or it is too late.
        """
        turn = None
        try:
            turn = self._free_place_or_turn(arrival)
            if turn:
                self._wait(turn, arrival.time + self._patience)
        except Overloaded:
            metrics.REFUSED.inc()
            raise
        finally:
            waited = time.monotonic() - arrival.time
            if turn or waited >= READING_SECONDS:
                metrics.WAIT.observe(waited)

    def give(self) -> None:
        """Give the place back, to the next thread in the queue if there is one."""
        with self._lock:
            if self._waiting:
                heapq.heappop(self._waiting).lock.release()
            else:
                self._free += 1

    def _free_place_or_turn(self, arrival: Arrival) -> "_Turn | None":
        """Take a free place, or join the queue and return a turn."""
        if time.monotonic() - arrival.time > self._latest:
            raise Overloaded(reason="no time left")
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            if len(self._waiting) >= self._places:
                raise Overloaded(reason="the queue is full")
            turn = _Turn(arrival.rank, next(self._numbers), threading.Lock())
            turn.lock.acquire()
            heapq.heappush(self._waiting, turn)
        return turn

    def _wait(self, turn: "_Turn", until: float) -> None:
        seconds = max(0.0, until - time.monotonic())
        if not turn.lock.acquire(timeout=seconds) and self._give_up(turn):
            raise Overloaded(reason="no place in time")

    def _give_up(self, turn: "_Turn") -> bool:
        """Leave the queue; return False if this thread has just got a place."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            heapq.heapify(self._waiting)
            return True


class _Turn(NamedTuple):
    """A request in the queue; `lock` is released when it gets a place. Equal ranks are numbered."""

    rank: float
    number: int
    lock: "threading.Lock"
