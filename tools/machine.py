"""Faults of the machine that harm one service only: few descriptors, full memory, a stalled log."""

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

MEMORY = "/dev/shm"  # noqa: S108 a private one
MEMORY_SIZE = "32m"

_CHUNK = bytes(64 * 1024)

READ_INTERVAL = 0.02  # seconds between copies of a log


# --- descriptors


def few_files(limit: int) -> Sequence[str]:
    """Return a command that runs another one with at most `limit` open files."""
    return ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]


# --- memory


def private_memory() -> Sequence[str]:
    """Return a command that runs another one with a small memory file system of its own."""
    mount = f'mount -t tmpfs -o size={MEMORY_SIZE} tmpfs {MEMORY}; exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "/bin/sh", "-ec", mount, "sh"]


def without_private_memory() -> str:
    """Return why `private_memory` does not work on this machine, or an empty string."""
    if not shutil.which("unshare"):
        return "unshare is not installed"
    tried = subprocess.run([*private_memory(), "true"], check=False, capture_output=True, text=True)
    return " ".join(tried.stderr.split()) if tried.returncode else ""


@contextmanager
def full_memory(pid: int) -> Iterator[None]:
    """Fill the private memory file system of a process during the block.

    Raises:
        ValueError: the process has no private one.
    """
    path = Path(f"/proc/{pid}/root{MEMORY}/filled-by-somebody-else")
    if path.parent.stat().st_dev == Path(MEMORY).stat().st_dev:
        raise ValueError(f"process {pid} shares {MEMORY} with others")
    with path.open("xb", buffering=0) as file:
        path.unlink()  # the kernel frees the memory when the file is closed
        try:
            while True:
                file.write(_CHUNK)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        yield


# --- the log


class LogReader:
    """Copies the pipes `*.pipe` in a folder to the files `*.log`, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[Path, tuple[int, IO[bytes]]] = {}
        self._stalled = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Read nothing during the block."""
        self._stalled.set()
        try:
            yield
        finally:
            self._stalled.clear()

    def close(self) -> None:
        """Copy the rest, which must be complete: no process may still write."""
        self._stopping.set()
        self._thread.join()
        self._copy()
        for pipe, file in self._open.values():
            os.close(pipe)
            file.close()

    def _run(self) -> None:
        while not self._stopping.wait(READ_INTERVAL):
            self._open_new()  # also while stalled: a pipe without a reader loses its content
            if not self._stalled.is_set():
                self._copy()

    def _open_new(self) -> None:
        for path in {*self._folder.glob("*.pipe")} - self._open.keys():
            pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            self._open[path] = pipe, path.with_suffix(".log").open("ab")

    def _copy(self) -> None:
        for pipe, file in self._open.values():
            with suppress(BlockingIOError):
                while data := os.read(pipe, 2**16):
                    file.write(data)
            file.flush()


@contextmanager
def log_reader(folder: Path) -> Iterator[LogReader]:
    """Run a reader of the folder's pipes until the end of the block."""
    reader = LogReader(folder)
    try:
        yield reader
    finally:
        reader.close()


def open_log_pipe(path: Path) -> int:
    """Make a pipe for a LogReader, and return its writing side."""
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)  # does not wait for the reader


def logging_to(pipe: Path) -> Sequence[str]:
    """Return a command that runs another one with its standard output in a new pipe."""
    os.mkfifo(pipe)
    return ["/bin/sh", "-c", 'exec "$@" 1<>"$0"', str(pipe)]
