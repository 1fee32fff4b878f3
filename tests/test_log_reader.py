"""A running service whose log is a pipe that nobody reads, and the last lines of its processes."""

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.fixtures import MakeProvider
from tests.service import Service
from tests.timing import eventually, within

AddProvider = Callable[..., int]

REQUESTS = 400
KEPT = 50  # lines that a queue holds here
DROPPED = "log lines dropped"

SHORT_QUEUE = f"""
import runpy
from notifier.serving import log_queue

log_queue.MAX_LINES = {KEPT}
globals().update(runpy.run_path("gunicorn.conf.py"))
"""


class Stalled:
    """A service that writes its log and its errors to a small pipe."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self.lines: list[dict[str, Any]] = []
        self.service = Service(folder, environment, output=writer)
        os.close(writer)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Read the log into `lines` from now on, and at last stop the service.

        Every line must be JSON.
        """
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self._read)
            try:
                yield
            finally:
                assert self.service.stop() == 0
        reading.result()

    def _read(self) -> None:
        with os.fdopen(self._reader, "rb", closefd=False) as log:
            for line in log:
                self.lines.append(json.loads(line))

    def leave(self) -> None:
        """Close the reader's end of the pipe."""
        os.close(self._reader)
        self._reader = os.open(os.devnull, os.O_RDONLY)

    def close(self) -> None:
        self.leave()
        self.service.stop()
        os.close(self._reader)

    def replies(self, count: int) -> set[int]:
        """Send notifications, eight at once; return the statuses of the replies."""
        with ThreadPoolExecutor(8) as pool:
            calls = pool.map(lambda _: self.service.notify(timeout=15), range(count))
            return {reply.status_code for reply in calls}


@pytest.fixture
def stalled(
    tmp_path: Path, database: dict[str, str], make_provider: MakeProvider, add_provider: AddProvider
) -> Iterator[Stalled]:
    add_provider(make_provider().url)
    config = tmp_path / "short_queue.py"
    config.write_text(SHORT_QUEUE)
    variables = {"WEB_CONCURRENCY": "2", "GUNICORN_CMD_ARGS": f"--config {config}"}
    stalled = Stalled(tmp_path, database | variables | {"LOG_LEVEL": "INFO"})
    stalled.service.wait_until_ready()
    yield stalled
    stalled.close()


def told(lines: list[dict[str, Any]]) -> int:
    """Return how many lines the log says are missing."""
    return sum(line["lines"] for line in lines if line["message"] == DROPPED)


def test_a_log_that_nobody_reads_costs_lines_and_no_reply(stalled: Stalled) -> None:
    service = stalled.service
    assert service.metric("log_lines_dropped_total") == 0
    assert stalled.replies(REQUESTS) == {200}
    for path in ("healthz", "readyz", "metrics"):
        with within(2):
            assert requests.get(f"{service.url}/{path}", timeout=15).status_code == 200
    dropped = service.metric("log_lines_dropped_total")
    assert dropped >= REQUESTS - 2 * KEPT - 4096 // 200

    with stalled.read():

        def written() -> int:
            return len([line for line in stalled.lines if line["message"] == "request"])

        eventually(lambda: written() + told(stalled.lines) == REQUESTS)
        assert told(stalled.lines) == dropped
        assert stalled.replies(1) == {200}
        eventually(lambda: written() + told(stalled.lines) == REQUESTS + 1)
        assert service.metric("log_lines_dropped_total") == dropped
    assert stalled.lines[-1]["message"] == "Shutting down: Master"


def test_a_reader_that_leaves_costs_lines_and_no_reply(stalled: Stalled) -> None:
    stalled.leave()
    assert stalled.replies(REQUESTS) == {200}
    eventually(lambda: stalled.service.metric("log_lines_dropped_total") >= REQUESTS)
    assert stalled.service.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_log_that_nobody_reads_does_not_hold_up_a_stop(stalled: Stalled, number: int) -> None:
    assert stalled.replies(REQUESTS) == {200}
    with within(20):  # graceful_timeout is 30 s
        assert stalled.service.stop(number) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_workers_are_replaced_although_nobody_reads_the_log(stalled: Stalled, number: int) -> None:
    service = stalled.service
    assert stalled.replies(REQUESTS) == {200}
    for starts in (3, 4, 5):
        service.booted()[0].send_signal(number)
        eventually(lambda starts=starts: service.metric("worker_starts_total") == starts)
        assert stalled.replies(10) == {200}
    with stalled.read():  # the master logs how they ended as soon as somebody reads
        ended = "Worker (pid:"
        eventually(lambda: sum(ended in line["message"] for line in stalled.lines) == 3)


def test_a_reload_works_although_nobody_reads_the_log(stalled: Stalled) -> None:
    service = stalled.service
    assert stalled.replies(REQUESTS) == {200}
    old = service.booted()
    service.process.send_signal(signal.SIGHUP)
    _, alive = psutil.wait_procs(old, timeout=30)
    assert alive == []
    assert stalled.replies(10) == {200}


CRASH = """
import os, runpy, signal, sys

shipped = runpy.run_path("gunicorn.conf.py")
globals().update(shipped)

def post_worker_init(worker):
    if {before}:
        shipped["post_worker_init"](worker)
    worker.log.info("almost there")
    {act}
"""

CRASHES = {
    "raise RuntimeError": "Exception in worker process",
    "sys.exit(3)": "Worker exiting",
    "os.kill(os.getpid(), signal.SIGABRT)": "Worker exiting",
    "os.kill(os.getpid(), signal.SIGQUIT)": "Worker exiting",
}


@pytest.mark.parametrize("before", [True, False], ids=["with a thread", "without"])
@pytest.mark.parametrize("act", CRASHES)
def test_the_last_lines_of_a_worker_that_crashes_come_out(
    tmp_path: Path, database: dict[str, str], act: str, before: bool
) -> None:
    config = tmp_path / "crash.py"
    config.write_text(CRASH.format(before=before, act=act))
    service = Service(tmp_path, database | {"GUNICORN_CMD_ARGS": f"--config {config}"})
    try:
        eventually(lambda: f'"{CRASHES[act]}' in service.log.read_text())
    finally:
        service.stop()
    logged, _, _ = service.log.read_text().partition(f'"{CRASHES[act]}')
    assert logged.count('"almost there"') == 1
