"""A service that has no room for its metrics files: counts may suffer, notifications not."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests import tmpfs
from tests.fixtures import Environment, MakeProvider, connect
from tests.scripted_provider import ScriptedProvider
from tests.service import Service
from tests.timing import eventually

NEEDS_TMPFS = pytest.mark.needs("tmpfs")

AddProvider = Callable[..., int]
StartService = Callable[..., Service]

WORKERS = 3

# More than the files have room for at first: each endpoint takes about 2 KiB.
ENDPOINTS = 200


@pytest.fixture
def provider(make_provider: MakeProvider, add_provider: AddProvider) -> ScriptedProvider:
    provider = make_provider()
    add_provider(provider.url)
    return provider


@pytest.fixture
def start(
    tmp_path: Path, database: Environment, provider: ScriptedProvider
) -> Iterator[StartService]:
    """Start three workers, by default with a /dev/shm of their own."""
    with ExitStack() as stack:

        def start(
            options: str = "size=20m",
            *,
            workers: int = WORKERS,
            within: tuple[str, ...] | None = None,
        ) -> Service:
            environment = database | {"WEB_CONCURRENCY": str(workers), "LOG_LEVEL": "INFO"}
            service = Service(tmp_path, environment, within or tmpfs.within(options))
            stack.callback(service.stop)
            return service

        yield start


def lines(service: Service, message: str) -> list[dict[str, Any]]:
    return [line for line in service.lines() if line["message"] == message]


def deliver(service: Service, provider: ScriptedProvider, times: int = 20) -> None:
    """Send notifications over new connections, so that they reach several workers."""
    before = len(provider.received)
    assert [service.notify().status_code for _ in range(times)] == [200] * times
    assert len(provider.received) == before + times


def pids(service: Service) -> set[int]:
    return {worker.pid for worker in service.booted()}


def add_endpoints(database: Environment, first: int = 1) -> None:
    """Add providers that no notification reaches, with an endpoint each."""
    with connect(database) as connection:
        connection.execute(
            "INSERT INTO notification_preferences (provider_type, provider_name, host, priority)"
            " SELECT 'Email', 'spare', 'http://127.0.0.1:' || port || '/', 9"
            " FROM generate_series(%s::int, %s) AS port",
            (first, first + ENDPOINTS - 1),
        )


@NEEDS_TMPFS
def test_a_full_memory_file_system_costs_no_notification_no_worker_and_no_count(
    start: StartService, provider: ScriptedProvider
) -> None:
    service = start().wait_until_ready().wait_until_listening()
    before = pids(service)
    tmpfs.fill(service)
    deliver(service, provider)
    assert pids(service) == before
    assert service.metric("notifications_total", outcome="delivered") == 20
    assert service.metric("http_client_duration_seconds_count") == 20
    assert service.metric("http_server_active_requests") == 0
    assert lines(service, "metrics are not shared") == []


@NEEDS_TMPFS
def test_successors_and_additional_workers_start_while_it_is_full(
    start: StartService, provider: ScriptedProvider
) -> None:
    service = start().wait_until_ready().wait_until_listening()
    deliver(service, provider, 5)
    tmpfs.fill(service)
    for victim in service.booted():
        victim.kill()
        psutil.wait_procs([victim], timeout=20)
    eventually(lambda: service.metric("worker_starts_total") == 2 * WORKERS)
    service.process.send_signal(signal.SIGTTIN)
    eventually(lambda: lines(service, "metrics are not shared"))
    eventually(lambda: len(service.booted()) == WORKERS + 1)
    before = pids(service)
    deliver(service, provider)
    assert pids(service) == before
    (line,) = lines(service, "metrics are not shared")
    assert (line["level"], line["reason"]) == ("ERROR", "No space left on device")
    assert requests.get(f"{service.url}/metrics", timeout=10).status_code == 200


@NEEDS_TMPFS
def test_each_worker_says_once_that_its_files_cannot_grow(
    start: StartService, provider: ScriptedProvider, database: Environment
) -> None:
    service = start().wait_until_ready().wait_until_listening()
    before = pids(service)
    filler = tmpfs.fill(service)
    add_endpoints(database)
    eventually(lambda: len(lines(service, "metrics are not shared")) == WORKERS)
    add_endpoints(database, first=1000)
    deliver(service, provider)
    assert pids(service) == before
    assert service.metric("notifications_total", outcome="delivered") == 20
    assert len(lines(service, "metrics are not shared")) == WORKERS

    filler.unlink()
    for worker in service.booted():
        worker.kill()
    eventually(lambda: service.metric("worker_starts_total") == 2 * WORKERS)
    service.wait_until_listening()
    replies = [requests.get(f"{service.url}/metrics", timeout=10).text for _ in range(WORKERS * 2)]
    assert {page.count("circuit_breaker_state{") for page in replies} == {2 * ENDPOINTS + 1}


@NEEDS_TMPFS
def test_a_service_starts_on_a_full_memory_file_system_and_counts_on_a_disk(
    start: StartService, provider: ScriptedProvider
) -> None:
    service = start("size=64k").wait_until_ready().wait_until_listening()
    tmpfs.fill(service)
    deliver(service, provider)
    assert service.metric("notifications_total", outcome="delivered") == 20
    assert lines(service, "metrics are not shared") == []


@NEEDS_TMPFS
def test_workers_start_while_it_has_room_for_no_further_file(
    start: StartService, provider: ScriptedProvider
) -> None:
    """A worker needs a file for its heartbeat."""
    service = start("size=20m,nr_inodes=100").wait_until_ready().wait_until_listening()
    before = pids(service)
    tmpfs.take_all_names(service)
    service.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(pids(service) - before) == len(pids(service)) == WORKERS)
    deliver(service, provider)
    reasons = {line["reason"] for line in lines(service, "worker not started")}
    assert reasons == {"No space left on device"}
    assert len(lines(service, "metrics are not shared")) == WORKERS
    assert requests.get(f"{service.url}/metrics", timeout=10).status_code == 200


# No file may be as large as a metrics file, but the log may be written.
SMALL_FILES = ("sh", "-c", 'ulimit -f 100 && exec "$@"', "sh")


def test_a_worker_without_any_metrics_file_counts_for_itself(
    start: StartService, provider: ScriptedProvider
) -> None:
    service = start(workers=1, within=SMALL_FILES).wait_until_ready()
    deliver(service, provider)
    assert service.metric("notifications_total", outcome="delivered") == 20
    assert service.metric("notification_duration_seconds_count", recipient="buyer") == 20
    assert service.metric("http_server_active_requests") == 0
    (line,) = lines(service, "metrics are not shared")
    assert (line["level"], line["reason"]) == ("ERROR", "File too large")
    for victim in service.booted():
        victim.kill()
    eventually(lambda: len(lines(service, "metrics are not shared")) == 2)
    deliver(service, provider)
    assert service.metric("notifications_total", outcome="delivered") == 20


def test_workers_without_any_metrics_file_serve_and_each_says_so_once(
    start: StartService, provider: ScriptedProvider
) -> None:
    service = start(within=SMALL_FILES)
    eventually(lambda: len(lines(service, "listening for changes of preferences")) == WORKERS)
    before = pids(service)
    deliver(service, provider)
    assert pids(service) == before
    assert service.metric("worker_starts_total") == 1  # of the worker that answers
    assert len(lines(service, "metrics are not shared")) == WORKERS
