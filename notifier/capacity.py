"""Limits the notifications that run at once in this worker: others wait, or are refused."""

import math
import threading
import time

from notifier import metrics
from notifier.arrival import Arrival
from notifier.errors import Overloaded
from notifier.ranked_queue import RankedQueue, Ticket

# Seconds from the arrival of a request. Shorter delays are its normal handling, and no wait.
READING_SECONDS = 0.01


class Capacity:
    """The places of a worker: `take` one, then `give` it back.

    A place that is given back goes to the request in the queue with the lowest rank, and becomes
    free only if no request waits. Shared between threads: `_free` and `_queue`,
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
        self._queue = RankedQueue()
        metrics.PLACES.set(places)

    def take(self, arrival: Arrival) -> None:
        """Take a place; wait in the queue if none is free.

        Raises:
            Overloaded: the queue is full, no place became free in time, or it is too late.
        """
        ticket = None
        try:
            ticket = self._free_place_or_ticket(arrival)
            if ticket:
                self._wait(ticket, arrival.time + self._patience)
        except Overloaded:
            metrics.REFUSED.inc()
            raise
        finally:
            waited = time.monotonic() - arrival.time
            if ticket or waited >= READING_SECONDS:
                metrics.WAIT.observe(waited)

    def give(self) -> None:
        """Give the place back, to the next thread in the queue if there is one."""
        with self._lock:
            if self._queue:
                self._queue.call()
            else:
                self._free += 1

    def _free_place_or_ticket(self, arrival: Arrival) -> Ticket | None:
        """Take a free place, or join the queue and return a ticket."""
        if time.monotonic() - arrival.time > self._latest:
            raise Overloaded(reason="no time left")
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            if len(self._queue) >= self._places:
                raise Overloaded(reason="the queue is full")
            return self._queue.join(arrival.rank)

    def _wait(self, ticket: Ticket, until: float) -> None:
        if ticket.wait(until - time.monotonic()):
            return
        with self._lock:
            if self._queue.leave(ticket):
                raise Overloaded(reason="no place in time")
