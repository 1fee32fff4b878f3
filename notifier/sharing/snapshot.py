"""Memory without a name that the processes of one master share: a value that outlives a process.

The memory is gone when the last of these processes ends, even by SIGKILL.
"""

import errno
import fcntl
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Maximum bytes of a value.
LARGEST = 16 * 1024 * 1024

# Maximum seconds that a process waits for another one, which needs milliseconds.
LOCK_WAIT = 0.5

_HEAD = struct.Struct(">QII")  # number, length and checksum of the value
_SLOT = _HEAD.size + LARGEST


class Snapshot:
    """A value of bytes, at first empty. The master makes it, and workers inherit it.

    There are two slots, and a value replaces the older one: a process that dies while it writes
    leaves the newer one intact. Reads and writes return an error if memory is short, whereas
    mapped memory would raise SIGBUS.

    Shared between processes: the slots, guarded by a record lock, which ends with its process. It
    does not keep threads of one process apart: they have to take turns.

    Raises:
        OSError: the memory cannot be made.
    """

    def __init__(self) -> None:
        self._fd = _memory()

    def close(self) -> None:
        """Close this process's descriptor."""
        os.close(self._fd)

    def read(self) -> bytes:
        """Return the value.

        Raises:
            OSError: the memory cannot be read, or another process holds it for too long.
        """
        with self._locked():
            return self._latest()[1]

    def replace(self, choose: Callable[[bytes], bytes | None]) -> None:
        """Replace the value by what `choose` returns for it; None leaves it.

        Raises:
            TimeoutError: another process holds the memory for too long.
            Exception: the new value is too large, memory is short (OSError), or `choose` raised it.
                The value is then empty, as it is out of date.
        """
        with self._locked():
            number, value = self._latest()
            try:
                new = choose(value)
                if new is not None:
                    self._write(number + 1, new)
            except Exception:
                os.ftruncate(self._fd, 0)
                raise

    def _write(self, number: int, value: bytes) -> None:
        if len(value) > LARGEST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        head = _HEAD.pack(number, len(value), zlib.crc32(value, number))
        if os.pwrite(self._fd, head + value, number % 2 * _SLOT) < _HEAD.size + len(value):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _latest(self) -> tuple[int, bytes]:
        """Return the number and the value of the newer slot; 0 and nothing if both are empty."""
        return max(self._slot(0), self._slot(1))

    def _slot(self, index: int) -> tuple[int, bytes]:
        head = os.pread(self._fd, _HEAD.size, index * _SLOT)
        if len(head) < _HEAD.size:
            return 0, b""
        number, length, checksum = _HEAD.unpack(head)
        value = os.pread(self._fd, min(length, LARGEST), index * _SLOT + _HEAD.size)
        return (number, value) if zlib.crc32(value, number) == checksum else (0, b"")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        give_up = time.monotonic() + LOCK_WAIT
        while not self._lock():
            if time.monotonic() > give_up:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # another process holds it
            return False
        return True


def _memory() -> int:
    """Return the descriptor of an empty file without a name; programs do not inherit it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("notifier")
        os.fchmod(fd, 0o600)
        return fd
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())
