"""Limits the notifications that run at once in this worker: others wait, or are refused."""

import threading
import time
from collections import deque

from notifier import metrics
from notifier.errors import Overloaded


class Capacity:
    """The places of a worker: `with capacity:` holds one for the length of the block.

    First come, first served: a place that is given back goes to the thread that has waited longest,
    and becomes free only if no thread waits. Shared between threads: `_free` and `_waiting`,
    guarded by `_lock`, which is never held while waiting.

    Args:
        places: notifications that may run at once; as many more may wait.
        patience: maximum seconds to wait.
    """

    def __init__(self, places: int, patience: float) -> None:
        self._places = places
        self._patience = patience
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Lock] = deque()
        metrics.PLACES.set(places)

    def __enter__(self) -> None:
        """Take a place; wait in the queue if none is free.

        Raises:
            Overloaded: the queue is full, or no place became free in time.
        """
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = self._queue()
        self._wait(turn)

    def __exit__(self, *_: object) -> None:
        """Give the place back, to the next thread in the queue if there is one."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def _queue(self) -> threading.Lock:
        """Join the queue; return a lock that is released when this thread gets a place."""
        if len(self._waiting) >= self._places:
            metrics.REFUSED.inc()
            raise Overloaded(reason="the queue is full")
        turn = threading.Lock()
        turn.acquire()
        self._waiting.append(turn)
        return turn

    def _wait(self, turn: threading.Lock) -> None:
        began = time.monotonic()
        came = turn.acquire(timeout=self._patience) or not self._give_up(turn)
        metrics.WAIT.observe(time.monotonic() - began)
        if not came:
            metrics.REFUSED.inc()
            raise Overloaded(reason="no place in time")

    def _give_up(self, turn: threading.Lock) -> bool:
        """Leave the queue; return False if this thread has just got a place."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True
