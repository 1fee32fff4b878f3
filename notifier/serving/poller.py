"""Waits for readable connections, in many threads at once.

Each connection is reported once, to one thread, until it is armed again. Idle threads wait in the
kernel, and epoll wakes the thread that became idle last. So no Python thread hands a connection to
another, and no thread wakes up in vain.
"""

import os
import select
import sys

# Results of `wait` that are not file descriptors.
STOPPED, NOTHING = -1, -2

# Maximum number of file descriptors that `ready` returns.
MANY = 1000

if sys.platform == "linux":

    class _Once:
        def __init__(self) -> None:
            self._epoll = select.epoll()

        def add(self, fd: int) -> None:
            """Report `fd` once, when it becomes readable. Closing `fd` removes it."""
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

        def again(self, fd: int) -> None:
            """Report `fd` once more, when it becomes readable."""
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

        def after_others(self, fd: int) -> None:
            """Report `fd` once more, when it is writable, behind the descriptors that are ready."""
            self._epoll.modify(fd, select.EPOLLOUT | select.EPOLLONESHOT)

        def _always(self, fd: int) -> None:
            self._epoll.register(fd, select.EPOLLIN)

        def _next(self, seconds: float) -> int:
            events = self._epoll.poll(seconds, maxevents=1)
            return events[0][0] if events else NOTHING

        def _all(self) -> list[int]:
            return [fd for fd, _ in self._epoll.poll(0, maxevents=MANY)]

else:

    class _Once:
        def __init__(self) -> None:
            self._kqueue = select.kqueue()

        def add(self, fd: int) -> None:
            """Report `fd` once, when it becomes readable. Closing `fd` removes it."""
            self._watch(fd, select.KQ_FILTER_READ, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)

        again = add

        def after_others(self, fd: int) -> None:
            """Report `fd` once more, when it is writable, behind the descriptors that are ready."""
            self._watch(fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD | select.KQ_EV_ONESHOT)

        def _always(self, fd: int) -> None:
            self._watch(fd, select.KQ_FILTER_READ, select.KQ_EV_ADD)

        def _watch(self, fd: int, event: int, flags: int) -> None:
            self._kqueue.control([select.kevent(fd, event, flags)], 0)

        def _next(self, seconds: float) -> int:
            events = self._kqueue.control(None, 1, seconds)
            return events[0].ident if events else NOTHING

        def _all(self) -> list[int]:
            return [event.ident for event in self._kqueue.control(None, MANY, 0)]


class Poller(_Once):
    """Reports file descriptors that are ready. Any thread may call any method."""

    def __init__(self) -> None:
        super().__init__()
        self._stop, self._stopping = os.pipe()
        self._always(self._stop)

    def wait(self, seconds: float) -> int:
        """Return a file descriptor as soon as one is ready.

        Return `STOPPED` after `stop()`, or `NOTHING` if this thread got no descriptor within
        `seconds`.
        """
        fd = self._next(seconds)
        return STOPPED if fd == self._stop else fd

    def ready(self) -> list[int]:
        """Return the file descriptors that are ready now, without waiting."""
        return [fd for fd in self._all() if fd != self._stop]

    def stop(self) -> None:
        """Let every `wait()` return `STOPPED`."""
        os.write(self._stopping, b".")  # never read, so it stays readable
