"""A queue between a process and the reader of its log: no caller waits for a reader that stalls."""

import io
import logging
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TextIO

# Lines that a process keeps while the reader stalls. Beyond that, new lines are dropped.
MAX_LINES = 10_000

# Minimum seconds between two rounds of writing: under load, a write takes several lines.
COLLECT_SECONDS = 0.01

# Seconds that a process waits at its exit for the reader to take the last lines.
FLUSH_SECONDS = 1.0

# A moment on `time.monotonic()` that has passed: do not wait.
_PAST = 0.0


class QueueHandler(logging.Handler):
    """Formats each line in the calling thread, and queues it.

    Once `start` has been called, a thread writes the lines. Before, each call writes as much as the
    reader takes at once: the master forks, so it must not have threads.

    Lines are dropped while the queue is full, and if a write fails. A line in the log tells their
    number at the place where they are missing.

    Shared with the thread: `_lines`, which only the thread shortens; `_asleep`; and three numbers
    of lines. Callers change `_refused`, under the handler's lock; the thread, `_failed` and
    `_told`.
    """

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._fd = nonblocking(stream.fileno()) if stream else os.open(os.devnull, os.O_WRONLY)
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # the queued lines are the parent's

    def _begin(self) -> None:
        self._lines: deque[bytes] = deque()
        self._refused = self._failed = self._told = 0
        self._count: Callable[[int], object] = lambda _: None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._asleep = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # reentrant: a destructor may log
        self._is_cut = False  # the last write ended within a line
        self._is_torn = False  # and the rest of that line was dropped

    def start(self, count: Callable[[int], object]) -> None:
        """Write from a thread from now on; `count` is called with each number of dropped lines."""
        self._count = count
        count(self._refused + self._failed)
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Wait for the queued lines to be written, for a limited time; logging calls it at exit."""
        if self._thread:
            self._stopping = True
            self._wake.put(None)
            self._thread.join(FLUSH_SECONDS)
        else:
            self.write_queued(time.monotonic() + FLUSH_SECONDS)
        self._count(len(self._lines))
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of `record`, or drop it."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:  # noqa: BLE001 as every handler does
            self.handleError(record)
            return
        if len(self._lines) >= MAX_LINES:
            self._refused += 1
            self._count(1)
            return
        self._lines.append(line)
        if self._asleep:
            self._asleep = False
            self._wake.put(None)
        elif not self._thread:
            self.write_queued()

    def _run(self) -> None:
        next_write = _PAST
        while not self._stopping:
            self._asleep = True
            if not self._lines:
                self._wake.get()
            self._asleep = False
            time.sleep(max(0.0, next_write - time.monotonic()))
            next_write = time.monotonic() + COLLECT_SECONDS
            with suppress(MemoryError):  # the lines are still queued
                self.write_queued(None)

    def write_queued(self, until: float | None = _PAST) -> None:
        """Write the queued lines; wait for the reader until that moment, or without a limit."""
        while any(due := (len(self._lines), self._refused + self._failed - self._told)):
            queued, missing = due  # the missing lines came after the queued ones
            while queued > 0:
                if not (done := self._write_oldest(until)):
                    return
                queued -= done
            if missing and not self._tell(missing, until):
                return

    def _write_oldest(self, until: float | None) -> int:
        """Write the oldest lines once; return how many entries of `_lines` are done."""
        oldest = self._oldest()
        data = b"".join(oldest)
        try:
            if not (sent := self._write(data, until)):
                return 0
        except OSError:  # the reader has gone, or the disk is full
            dropped = data.count(b"\n")
            self._failed += dropped
            self._count(dropped)
            sent = len(data)
        for _ in oldest:
            self._lines.popleft()
        if rest := data[sent:]:
            self._lines.appendleft(rest)
        return len(oldest)

    def _write(self, data: bytes, until: float | None) -> int:
        """Write once, and return how much of `data` was written; see `write`."""
        end = b"\n" if self._is_torn else b""
        try:
            sent = write(self._fd, end + data, until)
        except OSError:
            self._is_torn |= self._is_cut
            self._is_cut = False
            raise
        if sent:
            self._is_torn = False
            self._is_cut = not (end + data)[:sent].endswith(b"\n")
        return max(0, sent - len(end))

    def _oldest(self) -> list[bytes]:
        """Return the oldest lines, at least one, at most as many as one atomic write takes."""
        size, oldest = len(self._lines[0]), [self._lines[0]]
        while len(oldest) < len(self._lines):
            size += len(line := self._lines[len(oldest)])
            if size > select.PIPE_BUF:
                break
            oldest.append(line)
        return oldest

    def _tell(self, missing: int, until: float | None) -> bool:
        """Write a line about `missing` lines; return True if it was written."""
        fields = {"name": __name__, "levelname": "WARNING", "msg": "log lines dropped"}
        record = logging.makeLogRecord(fields | {"lines": missing})
        line = f"{self.format(record)}\n".encode()
        try:
            sent = self._write(line, until)
        except OSError:
            return False
        self._is_torn |= 0 < sent < len(line)
        self._told += missing if sent == len(line) else 0
        return sent == len(line)


class _Dropping(io.RawIOBase):
    """A stream that drops whatever it cannot write at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with suppress(OSError):
            write(self._fd, bytes(data), _PAST)
        return len(data)


def dropping(stream: TextIO) -> TextIO:
    """Return a stream to the same file that drops text while its reader stalls."""
    buffered = io.BufferedWriter(_Dropping(nonblocking(stream.fileno())))
    return io.TextIOWrapper(buffered, "utf-8", "backslashreplace", line_buffering=True)


def nonblocking(fd: int) -> int:
    """Return a descriptor of the same pipe or terminal that never blocks, or else `fd`.

    The flags of `fd` must not change: other processes share them. A pipe that is opened again has
    flags of its own. Without them, a write may block if another process fills the pipe after the
    poll.
    """
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd


def write(fd: int, data: bytes, until: float | None) -> int:
    """Write once, and return the number of bytes written: 0 if the reader takes none in time.

    Args:
        until: how long to wait for the reader, on `time.monotonic()`; None for no limit.

    Raises:
        OSError: the write failed.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(None if until is None else max(0.0, 1000 * (until - time.monotonic()))):
        return 0
    with suppress(BlockingIOError):
        return os.write(fd, data)
    return 0
