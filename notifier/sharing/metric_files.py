"""The values of metrics, in files that every worker of a master can read.

Each worker writes its own files, in the format of prometheus_client's `MmapedDict`, which
`MultiProcessCollector` reads. prometheus_client's own values live in sparse files, and a write to a
sparse file on a full file system ends the process with SIGBUS. Here the blocks of a file are
reserved before it is mapped, so a lack of room raises OSError where a file is made or grows. A
series without room is counted in the memory of this process.
"""

import logging
import mmap
import os
import struct
import sys
import threading
from pathlib import Path
from typing import Any

from prometheus_client.mmap_dict import MmapedDict, mmap_key

# First sizes in bytes, which double when full. Six providers fill a tenth: a histogram takes 5 KiB
# for each combination of labels, another metric about 250 bytes.
HISTOGRAM_BYTES = 256 * 1024
OTHER_BYTES = 64 * 1024

# Room kept for the values of one series, in entries of the size of its first: a histogram has 18
# values, and another thread may add a second histogram at the same time.
_MOST_VALUES = 40

_CELL_BYTES = 8

# What MmapedDict raises about a damaged file.
_DAMAGED = (struct.error, RuntimeError, ValueError)

log = logging.getLogger(__name__)

# A mapped file as doubles, and the index of one of them.
_Cell = tuple["memoryview[float]", int]
_Series = tuple[str, ...]


class Value:
    """One number of a metric: what prometheus_client expects of its `ValueClass`."""

    __slots__ = ("_at", "_cells")

    def __init__(self, cells: "memoryview[float]", at: int) -> None:
        self._cells = cells
        self._at = at

    def inc(self, amount: float) -> None:
        """Add `amount`."""
        with _lock:
            self._cells[self._at] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        """Replace the number; only gauges of the mode `mostrecent` would need `timestamp`."""
        with _lock:
            self._cells[self._at] = value

    def get(self) -> float:
        """Return the number."""
        return self._cells[self._at]

    def set_exemplar(self, exemplar: Any) -> None:
        """Do nothing: the files have no room for exemplars."""

    def get_exemplar(self) -> None:
        """Return None."""


# One lock for all values: holding it takes less time than finding another one.
_lock = threading.Lock()


class MetricFiles:
    """The files of the worker in `slot`, which continue those of the slot's last worker.

    Shared: the files and the set of private series, guarded by `_lock`.
    """

    def __init__(self, folder: Path, slot: str) -> None:
        self.folder = folder
        self._slot = slot
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._private: set[_Series] = set()

    def value(  # noqa: PLR0913, PLR0917 the signature of prometheus_client's ValueClass
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: tuple[str, ...],
        labelvalues: tuple[str, ...],
        help_text: str,
        multiprocess_mode: str = "",
    ) -> Value:
        """Return a value that all workers see, or only this one if the file system has no room."""
        series = (metric_name, *_without_bucket(labelnames, labelvalues))
        key = mmap_key(metric_name, name, labelnames, labelvalues, help_text)  # type: ignore[arg-type]
        kind = f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ
        if series not in self._private:
            try:
                with self._lock:
                    return Value(*self._file(kind).cell(series, key))
            except OSError as error:
                self._keep_private(series, error)
        return Value(memoryview(bytearray(_CELL_BYTES)).cast("d"), 0)

    def are_among(self, files: list[str]) -> bool:
        """Return True if `files` hold all values of this worker."""
        with self._lock:
            own = {os.fspath(file.path) for file in self._files.values()}
        return not self._private and own <= {*files}

    def _file(self, kind: str) -> "_File":
        if kind not in self._files:
            path = self.folder / f"{kind}_{self._slot}.db"
            size = HISTOGRAM_BYTES if kind == "histogram" else OTHER_BYTES
            self._files[kind] = _File(path, size)
        return self._files[kind]

    def _keep_private(self, series: _Series, error: OSError) -> None:
        with self._lock:
            is_first = not self._private
            self._private.add(series)
        if is_first:
            log.error("metrics are not shared", extra={"reason": error.strerror})


def _without_bucket(names: tuple[str, ...], labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the labels of a series, which are the same for all buckets of a histogram."""
    return labels[:-1] if names[-1:] == ("le",) else labels


class _File:
    """One file: a header that tells its end, then entries of a key and a cell. Not thread-safe."""

    def __init__(self, path: Path, size: int) -> None:
        """Open the file, or make it.

        Raises:
            OSError: it cannot be read, or has no room.
        """
        self.path = path
        self._begun: set[_Series] = set()  # series that have room for all of their values
        self._at = _read(path)  # the cells' indices by key
        # The header takes as many bytes as a cell; after the value of a cell comes a time.
        self._end = _CELL_BYTES * max((at + 2 for at in self._at.values()), default=1)
        while size < self._end:
            size *= 2
        self._map(size, "a+b")

    def cell(self, series: _Series, key: str) -> _Cell:
        """Return the place of a value, which is appended if it is new.

        Raises:
            OSError: the file is full and cannot grow.
        """
        if key not in self._at:
            entry = _entry(key)
            if series not in self._begun:
                self._make_room(_MOST_VALUES * len(entry))
                self._begun.add(series)
            self._append(key, entry)
        return self._cells, self._at[key]

    def _make_room(self, size: int) -> None:
        wanted = len(self._mapped)
        while wanted < self._end + size:
            wanted *= 2
        if wanted > len(self._mapped):
            self._map(wanted, "r+b")  # fails if a cleaner has removed the file

    def _map(self, size: int, mode: str) -> None:
        """Map `size` bytes. Values that use an earlier, shorter mapping stay valid."""
        with self.path.open(mode) as file:
            _reserve(file.fileno(), size)
            self._mapped = mmap.mmap(file.fileno(), size)
        self._cells = memoryview(self._mapped).cast("d")

    def _append(self, key: str, entry: bytes) -> None:
        """Write the entry, and only then the header: a reader sees the whole entry or nothing."""
        end = self._end + len(entry)
        self._mapped[self._end : end] = entry
        self._mapped[:4] = struct.pack("i", end)
        self._at[key] = (end - 16) // _CELL_BYTES
        self._end = end


def _reserve(file: int, size: int) -> None:
    """Make a file at least `size` bytes long, all of them backed by blocks."""
    if sys.platform == "darwin":  # it has no posix_fallocate
        os.truncate(file, size)
    else:
        os.posix_fallocate(file, 0, size)


def _read(path: Path) -> dict[str, int]:
    """Return the index of each key's cell; remove a damaged file, to start afresh."""
    try:
        found = [*MmapedDict.read_all_values_from_file(path)]  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        return {}
    except _DAMAGED:
        path.unlink()
        return {}
    return {key: at // _CELL_BYTES for key, _, _, at in found}


def _entry(key: str) -> bytes:
    """Return length and key, padded to a multiple of 8 bytes; then the value and a time, both 0."""
    encoded = key.encode()
    padded = encoded + b" " * (8 - (len(encoded) + 4) % 8)
    return struct.pack(f"i{len(padded)}sdd", len(encoded), padded, 0.0, 0.0)
