"""Pressure by the machine: few descriptors, full memory, a stalled log, and an absent database."""

import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from pathlib import Path

import psutil
import requests

from tools import faults, machine
from tools.bench import stacks
from tools.crowd import crowd
from tools.measure import Reply, load
from tools.pressure.greedy import burst
from tools.pressure.stand import SELLER, Answer, Row, Stand, all_ok, at_once, none, notify
from tools.rig import Service, wait_until

# --- descriptors

SELLERS = 32
SPARE = 39  # descriptors that the idle callers leave


def descriptors_1024(stand: Stand) -> Iterator[Row]:
    """Send sellers' notifications when idle callers have taken most of 1,024 descriptors."""
    return _descriptors(stand, 1024)


def descriptors_256(stand: Stand) -> Iterator[Row]:
    """Send sellers' notifications when idle callers have taken most of 256 descriptors."""
    return _descriptors(stand, 256)


def _descriptors(stand: Stand, limit: int) -> Iterator[Row]:
    with stand.service(1, through=machine.few_files(limit)) as service:
        before = service.workers()
        with crowd(service.port, limit - SPARE):
            answers = at_once(SELLERS, lambda: notify(service.url, SELLER))
        wait_until(lambda: _answers_metrics(service))
        opened = stacks.breakers_opened(stacks.Stack(service.port, service.pid))
        died = len(set(before) - set(service.workers()))
    yield all_ok(f"{SELLERS} sellers at once", answers)
    yield none("breakers opened", opened)
    yield none("workers died", died)


def _answers_metrics(service: Service) -> bool:
    try:
        return requests.get(f"{service.url}/metrics", timeout=5).ok
    except requests.RequestException:
        return False


# --- memory

MEMORY_WORKERS, IN_TURN = 2, 20


def full_memory(stand: Stand) -> Iterator[Row]:
    """Notify while the memory file system is full, before and after a worker is replaced."""
    if problem := machine.without_private_memory():
        yield Row("notifications", "", f"not measured: {problem}")
        return
    with stand.service(MEMORY_WORKERS, through=machine.private_memory()) as service:
        first = service.workers()
        with machine.full_memory(service.master().pid):
            answers, died = _in_turn(service)
            _replace(service, first)
            later, died_later = _in_turn(service)
    yield all_ok("notifications in turn", answers)
    yield all_ok("after a worker was killed", later)
    yield none("other workers that died", died + died_later)


def _in_turn(service: Service) -> tuple[list[Answer], int]:
    """Notify; return the answers, and how many workers have died meanwhile."""
    answers, seen = [], set(service.workers())
    for _ in range(IN_TURN):
        answers.append(notify(service.url))
        seen |= set(service.workers())
    return answers, len(seen - set(service.workers()))


def _replace(service: Service, workers: list[psutil.Process]) -> None:
    """Kill one of these workers if it still runs; return when there are enough again."""
    if running := {*workers} & {*service.workers()}:
        running.pop().kill()
    wait_until(lambda: len(service.workers()) == len(workers))
    wait_until(lambda: _answers_metrics(service))


# --- the log

LOGGED, LOG_CALLERS, LOG_WORKERS = 2_000, 8, 2
DEADLINE = 5  # seconds


def stalled_log(stand: Stand) -> Iterator[Row]:
    """Notify while nobody reads the log."""
    with tempfile.TemporaryDirectory(prefix="notifier-log-") as folder:
        pipe = Path(folder) / "service.pipe"
        with (
            machine.log_reader(pipe.parent) as reader,
            stand.service(
                LOG_WORKERS, through=machine.logging_to(pipe), NOTIFY_DEADLINE=f"{DEADLINE}s"
            ) as service,
            reader.stalled(),
        ):
            harvest = burst(service.port, LOG_CALLERS, LOGGED, DEADLINE + 1.0)
    ok = harvest.statuses.get("200", 0)
    figure = f"{ok}; the slowest {1000 * harvest.slowest:.0f} ms"
    met = ok == LOGGED and harvest.slowest <= DEADLINE
    yield Row(f"{LOGGED:,} notifications: 200 within the deadline", f"{LOGGED}", figure, met)


# --- the database

OUTAGE_WORKERS = 2
UNDER_LOAD = 2.0  # seconds of load after each event


def outage(stand: Stand) -> Iterator[Row]:
    """Reload the service and then kill a worker, while PostgreSQL is stopped."""
    with stand.service(OUTAGE_WORKERS) as service, load(service.url) as replies:
        time.sleep(UNDER_LOAD)
        with faults.stopped(stand.server):
            time.sleep(UNDER_LOAD)
            reloaded = _after(replies, partial(_reload, service))
            killed = _after(replies, partial(_replace, service, service.workers()))
    yield _failed(
        "not 200 after a reload", reloaded, [one.status != HTTPStatus.OK for one in reloaded]
    )
    errors = [one.status not in (0, HTTPStatus.OK) for one in killed]  # the kill cuts some
    yield _failed("errors after a worker was killed", killed, errors)


def _after(replies: list[Reply], event: partial[None]) -> list[Reply]:
    """Return the replies from the beginning of an event until a while after it."""
    first = len(replies)
    event()
    time.sleep(UNDER_LOAD)
    return replies[first:]


def _reload(service: Service) -> None:
    old = {*service.workers()}
    service.master().send_signal(signal.SIGHUP)
    wait_until(lambda: not old & {*service.workers()})


def _failed(measured: str, replies: list[Reply], failed: list[bool]) -> Row:
    return Row(measured, "0", f"{sum(failed)} of {len(replies)}", not any(failed))
