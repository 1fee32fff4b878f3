"""The metrics of all workers, added up from the files that they write."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# Errors that pass. A page without a file would look like a restart of its counters.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

log = logging.getLogger(__name__)


class MergedMetrics(Collector):
    """Adds up the files in `folder`.

    A series that is in no file comes from this process's `own` metrics, unless `are_complete` says
    that the files hold every one of its series. Private counts are not added to a series of the
    files: the sum would depend on the worker that answers, and Prometheus would take
    each decrease for a restart.
    """

    def __init__(
        self, folder: Path, own: Collector, are_complete: Callable[[list[str]], bool]
    ) -> None:
        self._folder = folder
        self._own = own
        self._are_complete = are_complete

    def collect(self) -> Iterable[Metric]:
        """Return the metrics; damaged files are skipped, and each is logged once."""
        files = _files(self._folder)
        try:
            merged = _merged(files)
        except Exception:  # noqa: BLE001 a damaged file can raise any
            files = [file for file in files if _is_sound(file)]
            merged = _merged(files)
        if not self._are_complete(files):
            _add_missing(merged, self._own.collect())
        return merged.values()


def _merged(files: list[str]) -> dict[str, Metric]:
    ends = {file: _end(file) for file in files}
    if min(ends.values(), default=0) < 0:  # the library would read nothing, without an error
        raise ValueError("negative end")
    begun = [file for file, end in ends.items() if end]
    merged: Iterable[Metric] = MultiProcessCollector.merge(begun)  # type: ignore[no-untyped-call]
    return {family.name: family for family in merged}


def _end(file: str) -> int:
    """Return where the entries of `file` end: 0 in a starting worker's new file."""
    try:
        with Path(file).open("rb") as opened:
            return int.from_bytes(opened.read(4), sys.byteorder, signed=True)
    except FileNotFoundError:  # a gauge of a dead worker
        return 0


def _add_missing(families: dict[str, Metric], own: Iterable[Metric]) -> None:
    for more in own:
        family = families.get(more.name) or Metric(more.name, more.documentation, more.type)
        known = {_series(sample) for sample in family.samples}
        family.samples += [sample for sample in more.samples if _series(sample) not in known]
        if family.samples:
            families[more.name] = family


def _series(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(sample.labels.items())


def _files(folder: Path) -> list[str]:
    try:
        return [os.fspath(file) for file in folder.iterdir()]
    except FileNotFoundError as error:  # a cleaner has removed the folder
        _log_skipped(os.fspath(folder), type(error).__name__)
        return []


def _is_sound(file: str) -> bool:
    """Return True if `file` can be read; else log once that it is skipped.

    Raises:
        OSError: this process lacks descriptors or memory.
    """
    try:
        _merged([file])
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        _log_skipped(file, type(error).__name__)
        return False
    return True


@cache
def _log_skipped(file: str, error: str) -> None:
    log.error("metrics file skipped", extra={"file": file, "error": error})
