"""A queue of threads by rank: the one with the lowest rank is called first."""

import heapq
import itertools
import threading
from typing import NamedTuple


class Ticket(NamedTuple):
    """The position of a thread in a queue. Among equal ranks the lowest number is first."""

    rank: float
    number: int
    called: "threading.Lock"  # released by the call

    def wait(self, seconds: float) -> bool:
        """Return True as soon as the thread is called, or False after `seconds`."""
        return self.called.acquire(timeout=max(0.0, seconds))


class RankedQueue:
    """The threads that wait for something. Except `Ticket.wait`, the owner's lock guards all."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []  # a heap
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._tickets)

    def join(self, rank: float) -> Ticket:
        """Return a ticket for a thread of this rank."""
        ticket = Ticket(rank, next(self._numbers), threading.Lock())
        ticket.called.acquire()
        heapq.heappush(self._tickets, ticket)
        return ticket

    def call(self) -> None:
        """Call the first thread; the queue must not be empty."""
        heapq.heappop(self._tickets).called.release()

    def leave(self, ticket: Ticket) -> bool:
        """Leave the queue; return False if the thread was called just now."""
        if ticket not in self._tickets:
            return False
        self._tickets.remove(ticket)
        heapq.heapify(self._tickets)
        return True
