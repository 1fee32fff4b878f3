"""Gives threads turns: which of them may run, and which ready connection the next one takes.

Threads share the interpreter, so many requests that run at once are all slow. Under load only
`RUNNERS` threads run at the same time. A request gives up its turn while it waits for others, such
as a provider, and takes another one afterwards.

Requests that have begun go before ready connections. Both queue by rank.
"""

import heapq
import threading
from collections.abc import Callable
from contextlib import suppress

from notifier.arrival import Arrival
from notifier.ranked_queue import RankedQueue
from notifier.serving.poller import NOTHING, STOPPED, Poller

# Maximum threads that run at once. If there were more, each would wait for the interpreter after
# every system call.
RUNNERS = 1

# Seconds after which an idle thread ends: fewer threads compete less for the interpreter.
THREAD_IDLE_SECONDS = 10.0

# Maximum seconds that a request which has begun waits for a turn.
PATIENCE = 1.0


class Turns:
    """The threads of a worker, and the ready connections that wait for one.

    Shared between threads, guarded by `_lock`: all attributes that change. The queue of connections
    is filled only while no thread is idle: idle threads wait in the kernel, and would not see it.

    Args:
        most: maximum number of threads.
        work: what a thread runs: it calls `take` and then `end`, again and again.
        rank: returns the rank of a connection's request by file descriptor: the lowest is first.
    """

    def __init__(self, most: int, work: Callable[[], None], rank: Callable[[int], float]) -> None:
        self.poller = Poller()
        self._most = most
        self._work = work
        self._rank = rank
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0  # threads that wait for a ready connection
        self._running = 0
        self._taken = self._taken_before = 0  # turns in all, and at the last look
        self._runners = RUNNERS
        self._resting: list[threading.Lock] = []  # released to let a thread take a connection
        self._resuming = RankedQueue()  # threads whose requests have begun
        self._queue: list[tuple[float, int]] = []  # a heap of ranks and file descriptors
        self._stopped = False

    @property
    def idle(self) -> bool:
        """Whether a thread waits for a ready connection."""
        return self._idle > 0

    def start(self) -> None:
        """Start the first thread."""
        with self._lock:
            self._start_thread()

    def stop(self) -> None:
        """End each thread after its request."""
        with self._lock:
            self._stopped = True
            for rest in self._resting:
                rest.release()
            self._resting.clear()
        self.poller.stop()

    def look(self) -> None:
        """Let one more thread run if none has begun to run since the last look.

        The running threads are blocked by a wait that did not give up its turn.
        """
        with self._lock:
            is_stuck = self._running >= RUNNERS and self._taken == self._taken_before
            self._runners = self._running + 1 if is_stuck else RUNNERS
            self._taken_before = self._taken
            self._dispatch()

    def take(self) -> int:
        """Take a turn; return the file descriptor of a ready connection.

        Return `STOPPED` to end the thread, without a turn.
        """
        while True:
            with self._lock:
                rest = None
                if self._stopped:
                    return STOPPED
                if self._running >= self._runners:
                    rest = threading.Lock()
                    rest.acquire()
                    self._resting.append(rest)
                elif (fd := self._next_in_queue()) != NOTHING:
                    self._run()
                    return fd
                else:
                    self._idle += 1
            fd = self._rest(rest) if rest else self._listen()
            if fd != NOTHING:
                return fd

    def end(self, *, calling: bool = False) -> None:
        """Give up a turn.

        Args:
            calling: call another thread to take a connection; else this one will.
        """
        with self._lock:
            self._running -= 1
            if calling or self._resuming:
                self._dispatch()

    def resume(self, rank: float) -> None:
        """Take another turn for a request of this rank; wait for it for `PATIENCE` at most."""
        with self._lock:
            if self._running < self._runners:
                self._running += 1
                return
            ticket = self._resuming.join(rank)
        if ticket.wait(PATIENCE):
            return
        with self._lock:
            if self._resuming.leave(ticket):
                self._running += 1

    def _run(self) -> None:
        self._running += 1
        self._taken += 1
        self._dispatch()

    def _dispatch(self) -> None:
        """Let others run if they may: a request that has begun, or else a thread for the next."""
        while self._resuming and self._running < self._runners:
            self._running += 1
            self._taken += 1
            self._resuming.call()
        if self._idle or self._running >= self._runners:
            return
        if self._resting:
            self._resting.pop().release()
        elif self._threads < self._most:
            with suppress(RuntimeError):  # no more threads are available
                self._start_thread()

    def _next_in_queue(self) -> int:
        """Return the connection in the queue with the lowest rank, or `NOTHING`."""
        if not self._idle:
            for fd in self.poller.ready():
                heapq.heappush(self._queue, (self._rank(fd), fd))
        return heapq.heappop(self._queue)[1] if self._queue else NOTHING

    def _listen(self) -> int:
        """Wait in the kernel; return a ready connection, `NOTHING`, or `STOPPED`."""
        fd = self.poller.wait(THREAD_IDLE_SECONDS)
        with self._lock:
            if fd == NOTHING and self._idle > 1:  # another thread stays
                self._threads -= 1
                fd = STOPPED
            self._idle -= 1
            if fd >= 0:
                self._run()
        return fd

    def _rest(self, rest: "threading.Lock") -> int:
        """Wait until the thread is called; return `NOTHING`, or `STOPPED` after a long time."""
        if rest.acquire(timeout=THREAD_IDLE_SECONDS):
            return NOTHING
        with self._lock:
            if rest not in self._resting:  # called just now
                return NOTHING
            self._resting.remove(rest)
            self._threads -= 1
        return STOPPED

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="request").start()
        self._threads += 1


class Turn:
    """The turn of one request, which begins with it. Used by one thread."""

    __slots__ = ("_has", "_turns", "arrival")

    def __init__(self, turns: Turns) -> None:
        self.arrival: Arrival  # set before the application runs
        self._turns = turns
        self._has = True

    def wait(self) -> None:
        """Give up the turn while the request waits for a provider or the caller."""
        if self._has:
            self._has = False
            self._turns.end(calling=True)

    def resume(self) -> None:
        """Take a turn again after a wait."""
        if not self._has:
            self._turns.resume(self.arrival.rank)
            self._has = True

    def end(self) -> None:
        """Give up the turn for good: this thread takes the next connection."""
        if self._has:
            self._has = False
            self._turns.end()
