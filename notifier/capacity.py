"""How many notifications run at once in this worker, and who waits, is refused, or comes next."""

import threading
import time
from collections import deque

from notifier import metrics
from notifier.errors import Overloaded


class Capacity:
    """The places of a worker: `with capacity:` holds one for the length of the block.

    First come, first served: whoever gives a place back hands it to whoever has waited longest, and
    it is free only when nobody waits. Shared: both attributes below `_lock`, which guards them; it
    is held to take, to give and to give up, never while waiting.

    Args:
        places: how many hold one at once; as many more may wait.
        patience: seconds to wait at most.
    """

    def __init__(self, places: int, patience: float) -> None:
        self._places = places
        self._patience = patience
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Lock] = deque()
        metrics.PLACES.set(places)

    def __enter__(self) -> None:
        """Take a place; wait in the queue if there is none.

        Raises:
            Overloaded: too many wait already, or no turn came in time.
        """
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = self._queue()
        self._wait(turn)

    def __exit__(self, *_: object) -> None:
        """Give the place back."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def _queue(self) -> threading.Lock:
        """Return a lock that is released when the place is ours."""
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
        """Leave the queue; False if the place was handed over just now."""
        with self._lock:
            if turn not in self._waiting:
                return False
            self._waiting.remove(turn)
            return True
