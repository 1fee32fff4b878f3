"""Gives ready connections to threads: which thread takes the next one, and which one that is.

Threads share the interpreter, so requests that are all begun at once are all slow. Only a few
threads begin requests at the same time. A request has begun once it waits for somebody else, such
as a provider, or has its reply.

While no thread may begin another request, ready connections queue by the rank of their requests.
"""

import heapq
import threading
from collections.abc import Callable
from contextlib import suppress

from notifier.serving.poller import NOTHING, STOPPED, Poller

# Maximum requests that are begun at once; more would only share the interpreter.
BEGINNERS = 3

# Seconds after which an idle thread ends: fewer threads compete less for the interpreter.
THREAD_IDLE_SECONDS = 10.0


class Turns:
    """The threads of a worker, and the ready connections that wait for one.

    Shared between threads, guarded by `_lock`: all numbers of threads, `_resting` and `_queue`. The
    queue is filled only while no thread is idle: idle threads wait in the kernel, and would not see
    it.

    Args:
        most: maximum number of threads.
        work: what a thread runs: it calls `take` and then `begun`, again and again.
        rank: returns the rank of a connection's request by file descriptor: the lowest is first.
    """

    def __init__(self, most: int, work: Callable[[], None], rank: Callable[[int], float]) -> None:
        self.poller = Poller()
        self._most = most
        self._work = work
        self._rank = rank
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0  # wait for a ready connection
        self._beginning = 0
        self._begun = self._begun_before = 0  # in all, and at the last look
        self._extra = 0
        self._resting: list[threading.Lock] = []  # released to call a thread
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

    def take(self) -> int:
        """Return the file descriptor of a ready connection, whose request the thread then begins.

        Return `STOPPED` to end the thread.
        """
        while True:
            with self._lock:
                rest = None
                if self._stopped:
                    return STOPPED
                if self._beginning >= BEGINNERS + self._extra:
                    rest = threading.Lock()
                    rest.acquire()
                    self._resting.append(rest)
                elif (fd := self._next_in_queue()) != NOTHING:
                    self._begin()
                    return fd
                else:
                    self._idle += 1
            fd = self._rest(rest) if rest else self._listen()
            if fd != NOTHING:
                return fd

    def begun(self) -> None:
        """Let another thread begin a request: the one of this thread waits now."""
        with self._lock:
            self._beginning -= 1
            self._call_thread()

    def ended(self) -> None:
        """Let this thread begin another request, without `begun` for the last one."""
        with self._lock:
            self._beginning -= 1

    def look(self) -> None:
        """Allow one more request to begin if none has begun since the last look.

        The requests that are beginning wait for something unforeseen.
        """
        with self._lock:
            is_stuck = self._beginning >= BEGINNERS and self._begun == self._begun_before
            self._extra = self._beginning - BEGINNERS + 1 if is_stuck else 0
            self._begun_before = self._begun
            self._call_thread()

    def _begin(self) -> None:
        self._beginning += 1
        self._begun += 1
        self._call_thread()

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
                self._begin()
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

    def _call_thread(self) -> None:
        """Make sure that a thread takes the next ready connection, if it may begin now."""
        if self._idle or self._beginning >= BEGINNERS + self._extra:
            return
        if self._resting:
            self._resting.pop().release()
        elif self._threads < self._most:
            with suppress(RuntimeError):  # no more threads are available
                self._start_thread()

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, name="request").start()
        self._threads += 1
