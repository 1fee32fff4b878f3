"""The files of metrics: their format, growth, lack of room, and damage."""

import errno
import logging
import mmap
import os
import resource
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from notifier.sharing.merged_metrics import MergedMetrics
from notifier.sharing.metric_files import HISTOGRAM_BYTES, OTHER_BYTES, MetricFiles

Series = dict[tuple[str, ...], float]


class Worker(NamedTuple):
    """The metrics of one worker, as `notifier.metrics` makes them."""

    files: MetricFiles
    registry: CollectorRegistry
    total: Counter
    seconds: Histogram
    active: Gauge

    def page(self) -> Series:
        """Return the page that this worker would show, by name and values of the labels."""
        merged = MergedMetrics(self.files.folder, self.registry, self.files.are_among)
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(generate_latest(merged).decode())
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def count(self, label: str, times: int = 1) -> None:
        """Count events that took a second each."""
        for _ in range(times):
            self.total.labels(label).inc()
            self.seconds.labels(label).observe(1.0)


StartWorker = Callable[..., Worker]


def instruments(make_value: object, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    registry = CollectorRegistry()
    with monkeypatch.context() as patch:
        patch.setattr(values, "ValueClass", make_value)
        gauge = Gauge("active", "What?", registry=registry, multiprocess_mode="livesum")
    return (
        registry,
        Counter("events_total", "Whät?", ["label"], registry=registry),
        Histogram("seconds", "How long?", ["label"], buckets=(0.5, 2.0), registry=registry),
        gauge,
    )


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartWorker:
    """Start a worker in a slot; its series take values from its files until the next one starts."""

    def start(slot: str = "0", folder: Path = tmp_path) -> Worker:
        files = MetricFiles(folder, slot)
        monkeypatch.setattr(values, "ValueClass", files.value)
        return Worker(files, *instruments(files.value, monkeypatch))  # type: ignore[arg-type]

    return start


def not_shared(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the reasons of the lines about metrics that are not shared."""
    lines = [record for record in caplog.records if record.message == "metrics are not shared"]
    assert all(line.levelno == logging.ERROR for line in lines)
    return [line.__dict__["reason"] for line in lines]


@contextmanager
def soft_limit(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


# --- the format


def test_the_files_are_those_that_the_library_would_write(
    start: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its collector reads them. If an upgrade changes the format, both change together."""

    def use(total: Counter, seconds: Histogram, active: Gauge) -> None:
        for label in ("", "a", "bcd", "Grüße\n\"'", "x" * 5000):
            total.labels(label).inc(2)
            seconds.labels(label).observe(0.7)
        active.inc(3)
        active.dec()

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    worker = start()
    use(*worker[2:])
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(theirs))
    library = values.MultiProcessValue(lambda: "0")  # type: ignore[no-untyped-call]
    monkeypatch.setattr(values, "ValueClass", library)
    use(*instruments(library, monkeypatch)[1:])  # type: ignore[arg-type]
    library.close_all_files()
    for file in theirs.iterdir():
        expected = file.read_bytes()
        used = struct.unpack_from("i", expected)[0]
        assert used > 8
        assert (tmp_path / file.name).read_bytes()[:used] == expected[:used]


def test_a_page_adds_up_all_workers_and_their_predecessors(start: StartWorker) -> None:
    for slot, times in (("0", 2), ("1", 3), ("0", 5)):
        worker = start(slot)
        worker.count("a", times)
        worker.active.inc()
    assert worker.page() == {
        ("events_total", "a"): 10,
        ("seconds_bucket", "a", "0.5"): 0,
        ("seconds_bucket", "a", "2.0"): 10,
        ("seconds_bucket", "a", "+Inf"): 10,
        ("seconds_count", "a"): 10,
        ("seconds_sum", "a"): 10,
        ("active",): 3,
    }


def test_counts_stay_exact_while_the_files_grow(start: StartWorker, tmp_path: Path) -> None:
    worker = start()
    for _ in range(2):
        for number in range(1500):
            worker.count(str(number))
    worker = start()  # it reads the grown files
    for number in range(1500):
        worker.count(str(number))
    page = worker.page()
    assert {page["events_total", str(number)] for number in range(1500)} == {3}
    assert {page["seconds_bucket", str(number), "+Inf"] for number in range(1500)} == {3}
    assert (tmp_path / "counter_0.db").stat().st_size == 2 * OTHER_BYTES
    assert (tmp_path / "histogram_0.db").stat().st_size == 4 * HISTOGRAM_BYTES


def test_threads_that_count_and_add_series_lose_nothing(start: StartWorker) -> None:
    worker = start()

    def work() -> None:
        for number in range(2000):
            worker.count(str(number % 500))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    page = worker.page()
    assert {page["events_total", str(number)] for number in range(500)} == {16}
    assert {page["seconds_sum", str(number)] for number in range(500)} == {16}


def is_reserved(file: Path) -> bool:
    status = file.stat()
    return status.st_size > 0 and status.st_blocks * 512 >= status.st_size


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no posix_fallocate")
def test_every_block_is_reserved_when_a_file_is_made_and_when_it_grows(
    start: StartWorker, tmp_path: Path
) -> None:
    worker = start()
    worker.count("a")
    assert all(is_reserved(file) for file in tmp_path.iterdir())
    for number in range(1500):
        worker.count(str(number))
    assert (tmp_path / "counter_0.db").stat().st_size > OTHER_BYTES
    assert all(is_reserved(file) for file in tmp_path.iterdir())


# --- no room


def no_room(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@contextmanager
def shortage(kind: str, folder: Path) -> Iterator[None]:
    """Let the next file fail for this reason, by real means where a process can make them."""
    if kind == "EFBIG":
        with soft_limit(resource.RLIMIT_FSIZE, OTHER_BYTES // 2):
            yield
    elif kind == "EMFILE":
        lowest_free = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest_free)
        with soft_limit(resource.RLIMIT_NOFILE, lowest_free):
            yield
    elif kind == "ENOENT":
        folder.rmdir()
        yield
    elif kind == "ENOTDIR":
        folder.rmdir()
        folder.touch()
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            number = getattr(errno, kind.removeprefix("mmap "))
            target = (mmap, "mmap") if kind.startswith("mmap ") else (os, "posix_fallocate")
            patch.setattr(*target, no_room(number), raising=False)
            yield


SHORTAGES = ["EFBIG", "EMFILE", "ENOENT", "ENOTDIR", "mmap ENOMEM"]
SHORTAGES += ["ENOSPC", "EDQUOT", "ENOMEM", "EACCES", "EIO", "EOPNOTSUPP"]


@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_worker_that_cannot_make_its_files_counts_for_itself_and_says_so_once(
    kind: str, start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with shortage(kind, folder):
        worker = start(folder=folder)
        worker.count("a", 3)
        worker.count("b")
        worker.active.set(7)
        worker.active.dec()
    number = getattr(errno, kind.removeprefix("mmap "))
    assert not_shared(caplog) == [os.strerror(number)]
    if kind == "ENOTDIR":
        folder.unlink()
    page = worker.page()
    assert page["events_total", "a"] == page["seconds_bucket", "a", "2.0"] == 3
    assert page["events_total", "b"] == page["seconds_sum", "b"] == 1
    assert page["active",] == 6


@pytest.mark.parametrize("kind", ["EFBIG", "ENOSPC", "EMFILE"])
def test_when_files_cannot_grow_their_series_stay_shared_and_new_ones_wait_for_room(
    kind: str, start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start()
    worker.count("first")
    labels = [str(number) for number in range(1500)]
    with soft_limit(resource.RLIMIT_FSIZE, HISTOGRAM_BYTES), shortage_of_growth(kind, tmp_path):
        for label in labels:
            worker.count(label)
        worker.count("first")
    assert len(not_shared(caplog)) == 1
    for label in ("last", *labels, "first"):
        worker.count(label)
    shared, seen = start("1").page(), worker.page()
    assert shared["events_total", "first"] == shared["seconds_sum", "first"] == 3
    assert shared["events_total", "last"] == shared["seconds_sum", "last"] == 1
    assert ("events_total", labels[-1]) not in shared
    assert {seen["events_total", label] for label in labels} == {2}
    assert {seen["seconds_sum", label] for label in labels} == {2}
    for label in labels:  # a histogram is shared as a whole or not at all
        buckets = [shared.get(("seconds_bucket", label, le)) for le in ("0.5", "2.0", "+Inf")]
        assert buckets == ([0, 2, 2] if ("seconds_sum", label) in shared else [None] * 3)


@contextmanager
def shortage_of_growth(kind: str, folder: Path) -> Iterator[None]:
    if kind == "EFBIG":  # the caller has set this limit
        with soft_limit(resource.RLIMIT_FSIZE, OTHER_BYTES):
            yield
    else:
        with shortage(kind, folder):
            yield


def test_counts_that_are_not_shared_are_not_added_to_a_series_of_another_worker(
    start: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum would change with the worker that answers, and a counter must not decrease."""
    other = start("0")
    other.count("a", 5)
    monkeypatch.setattr(os, "posix_fallocate", no_room(errno.ENOSPC), raising=False)
    worker = start("1")
    worker.count("a", 3)
    worker.count("b", 2)
    assert other.page()["events_total", "a"] == worker.page()["events_total", "a"] == 5
    assert worker.page()["events_total", "b"] == 2


def test_the_next_worker_shares_its_metrics_once_there_is_room(
    start: StartWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room(errno.ENOSPC), raising=False)
        start().count("a", 3)
    start().count("a", 2)
    assert start("1").page()["events_total", "a"] == 2
    assert len(not_shared(caplog)) == 1


def test_a_removed_folder_leaves_the_counts_of_the_worker_that_answers(
    start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    worker = start(folder=folder)
    worker.count("a", 3)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    worker.count("a")
    assert worker.page()["events_total", "a"] == worker.page()["seconds_sum", "a"] == 4
    (line,) = caplog.records
    assert (line.message, line.__dict__["file"]) == ("metrics file skipped", str(folder))


# --- damage


def entry(key: bytes) -> bytes:
    return (
        struct.pack("ii", 8 + 4 + len(key) + 16, 0) + struct.pack("i", len(key)) + key + bytes(16)
    )


DAMAGED = {
    "random": bytes(range(256)) * 64,
    "text": b"This is no metrics file.\n" * 99,
    "ones": b"\xff" * 8192,
    "too short for a header": b"\x40",
    "an end beyond the file": struct.pack("ii", 2**31 - 1, 0),
    "a key beyond the end": struct.pack("iii", 64, 0, 2**30) + bytes(64),
    "an entry that is cut": struct.pack("iii", 64, 0, 48) + b"k" * 48,
    "a key that is no UTF-8": entry(b"\xfe" * 12),
    "a key that is no JSON": entry(b"{" * 12),
    "a key of other JSON": entry(b"[1,  2,   3]"),
}


@pytest.mark.parametrize("name", ["counter_7.db", "gauge_livesum_7.db", "histogram_7.db", "core"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_skipped_and_named_once(
    kind: str, name: str, start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start()
    worker.count("a", 3)
    expected = worker.page()
    (tmp_path / name).write_bytes(DAMAGED[kind])
    for _ in range(3):
        assert worker.page() == expected
    (line,) = caplog.records
    assert (line.message, line.levelno) == ("metrics file skipped", logging.ERROR)
    assert line.__dict__["file"] == str(tmp_path / name)


@pytest.mark.parametrize("content", [b"", bytes(64), bytes(OTHER_BYTES)], ids=len)
def test_a_file_that_is_being_made_is_not_damaged(
    content: bytes, start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start()
    worker.count("a", 3)
    expected = worker.page()
    (tmp_path / "counter_7.db").write_bytes(content)
    assert worker.page() == expected
    assert not caplog.records


def test_something_else_in_the_place_of_a_file_is_skipped(
    start: StartWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "counter_0.db").mkdir()
    worker = start()
    worker.count("a", 3)
    assert worker.page()["events_total", "a"] == 3
    assert not_shared(caplog) == [os.strerror(errno.EISDIR)]


@pytest.mark.parametrize("content", [b"", *DAMAGED.values()], ids=["empty", *DAMAGED])
def test_the_successor_of_a_worker_with_a_damaged_file_starts_and_shares_its_counts(
    content: bytes, start: StartWorker, tmp_path: Path
) -> None:
    start().count("a", 3)
    (tmp_path / "counter_0.db").write_bytes(content)
    worker = start()
    worker.count("a")
    page = start("1").page()
    if ("events_total", "a") in page:
        assert page["events_total", "a"] == 1
    assert page["seconds_sum", "a"] == 4
    assert worker.page()["events_total", "a"] == 1


def test_a_page_without_a_file_for_lack_of_descriptors_is_not_shown(start: StartWorker) -> None:
    """Prometheus would take it for a restart of all counters."""
    worker = start()
    worker.count("a")
    with shortage("EMFILE", worker.files.folder), pytest.raises(OSError, match=r"Too many open"):
        worker.page()
