"""A running service under an orchestrator: probes, drain, stop, reload, upgrade, kill."""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import certifi
import psutil
import pytest
import requests

from tests.fixtures import MakeProvider
from tests.scripted_provider import Peer, Received, answer
from tests.service import ROOT, Service, clean_environment
from tests.sockets import LOOPBACK, not_answering, silent
from tests.timing import eventually, within

StartService = Callable[..., Service]
AddProvider = Callable[..., int]


class Gate:
    """A provider's script that answers once the gate is open."""

    def __init__(self) -> None:
        self._asked = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, peer: Peer, received: Received) -> None:
        self._asked.release()
        self._open.wait(30)
        answer()(peer, received)

    def wait_for(self, callers: int) -> None:
        for _ in range(callers):
            assert self._asked.acquire(timeout=20)

    def open(self) -> None:
        self._open.set()


# Seconds between a caller's requests, so that new workers get CPU time to start.
CALLERS_PAUSE = 0.005


@contextmanager
def callers(service: Service, count: int, *, keep: bool) -> Iterator[list[Any]]:
    """Notify continuously from `count` threads; yield a list of each request's status or error.

    Args:
        keep: True if each thread reuses its connection, False for a new one for each request.
    """
    outcomes: list[Any] = []
    enough = threading.Event()

    def call() -> None:
        with requests.Session() as session:
            while not enough.wait(CALLERS_PAUSE):
                try:
                    reply = service.notify(session=session if keep else requests)
                    outcomes.append(reply.status_code)
                except requests.RequestException as error:
                    outcomes.append(error)

    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(call) for _ in range(count)]
        try:
            yield outcomes
        finally:
            enough.set()
    for done in calls:
        done.result()


def reload(service: Service, starts: int) -> None:
    """Send SIGHUP; wait until the old workers have ended and `starts` have started in all."""
    old = service.booted()
    service.process.send_signal(signal.SIGHUP)
    psutil.wait_procs(old, timeout=30)
    eventually(lambda: service.metric("worker_starts_total") == starts)


def readiness(service: Service, session: Any = requests) -> tuple[int, dict[str, Any]]:
    reply = session.get(f"{service.url}/readyz", timeout=10)
    return reply.status_code, reply.json()


def metrics_folders(service: Service) -> list[Path]:
    """Return the metrics folder of each of the service's masters."""
    return [Path(line["folder"]) for line in service.lines() if "folder" in line]


# --- readiness


def test_a_service_with_its_database_is_ready(start_service: StartService) -> None:
    service = start_service().wait_until_listening()
    assert readiness(service) == (
        200,
        {
            "ready": True,
            "checks": {
                "preferences": {"ok": True, "detail": "held in cache"},
                "shutdown": {"ok": True, "detail": "not requested"},
            },
        },
    )


def test_cached_providers_keep_the_service_ready_without_the_database(
    start_service: StartService, allow_connections: Callable[[str], None]
) -> None:
    service = start_service(WEB_CONCURRENCY="1", CACHE_EXPIRED_TIME="1ms")
    assert readiness(service)[0] == 200
    allow_connections("false")
    status, report = readiness(service)
    assert (status, report["checks"]["preferences"]["detail"]) == (200, "held in cache")


def test_a_service_without_providers_is_not_ready_until_it_can_read_them(
    start_service: StartService, allow_connections: Callable[[str], None]
) -> None:
    allow_connections("false")
    service = start_service()
    status, report = readiness(service)
    assert (status, report["ready"]) == (503, False)
    assert report["checks"]["preferences"] == {
        "ok": False,
        "detail": "not held in cache, and PostgreSQL cannot be read: see the log",
    }
    assert service.metric("http_server_requests_total", http_status_code="503") == 1
    allow_connections("true")
    eventually(lambda: readiness(service)[0] == 200)


@pytest.mark.alone
@pytest.mark.parametrize("hanging", [silent, not_answering])
def test_readiness_is_answered_within_a_second_however_the_database_hangs(
    start_service: StartService, hanging: Callable[[], AbstractContextManager[int]]
) -> None:
    with hanging() as port:
        service = start_service(DB_HOST=LOOPBACK, DB_PORT=str(port), WEB_CONCURRENCY="1")
        for _ in range(3):
            with within(1):
                assert readiness(service)[0] == 503
            with within(1):
                assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200


# --- stop


def test_a_stop_lets_thirty_slow_requests_finish(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    gate = Gate()
    add_provider(make_provider(gate).url)
    service = start_service()
    with ThreadPoolExecutor(30) as pool:
        replies = [pool.submit(service.notify) for _ in range(30)]
        gate.wait_for(30)
        assert service.metric("http_server_active_requests") == 30
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: "Handling signal: term" in service.log.read_text())
        gate.open()
        assert [reply.result().status_code for reply in replies] == [200] * 30
    assert service.process.wait(30) == 0
    assert "Traceback" not in service.log.read_text()


def test_a_stop_does_not_wait_for_connections_without_a_request(
    start_service: StartService,
) -> None:
    """A load balancer opens connections in advance."""
    service = start_service(WEB_CONCURRENCY="1")
    with socket.create_connection(("127.0.0.1", service.port)):
        # This answer shows that the worker has accepted the silent connection too.
        assert requests.get(f"{service.url}/healthz", timeout=20).status_code == 200
        with within(15):  # graceful_timeout is 30 s
            assert service.stop() == 0


def test_a_draining_service_is_not_ready_but_still_serves(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2", DRAIN_DELAY="1h")
    with requests.Session() as kept:
        assert readiness(service, kept)[0] == 200
        assert service.notify().headers["Connection"] == "keep-alive"
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: readiness(service)[0] == 503)
        status, report = readiness(service, kept)
        assert (status, report["checks"]["shutdown"]) == (
            503,
            {"ok": False, "detail": "in progress"},
        )
    for _ in range(10):
        reply = service.notify()
        assert reply.status_code == 200
        assert reply.headers["Connection"] == "close"  # so the next request goes elsewhere
    assert service.stop() == 0
    assert [line["seconds"] for line in service.lines() if line["message"] == "draining"] == [3600]


def test_a_second_signal_ends_the_drain(start_service: StartService) -> None:
    service = start_service(DRAIN_DELAY="1h")
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: readiness(service)[0] == 503)
    assert service.stop() == 0


def test_without_a_drain_delay_a_stop_does_not_wait(start_service: StartService) -> None:
    service = start_service()
    assert service.stop() == 0
    assert "draining" not in {line["message"] for line in service.lines()}


def test_a_worker_that_a_reload_replaces_stays_ready_to_its_end(
    start_service: StartService,
) -> None:
    """The service is ready, and a prober that reuses its connection must see that."""
    service = start_service()
    with requests.Session() as kept:

        def is_the_old_workers_last() -> bool:
            reply = kept.get(f"{service.url}/readyz", timeout=10)
            assert reply.status_code == 200
            return reply.headers["Connection"] == "close"

        assert not is_the_old_workers_last()
        service.process.send_signal(signal.SIGHUP)
        eventually(is_the_old_workers_last)


HELD_BACK = """
import os, runpy, time

shipped = runpy.run_path("gunicorn.conf.py")
globals().update(shipped)

def post_fork(server, worker):
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(0.02)
    shipped["post_fork"](server, worker)
"""


def test_old_workers_serve_until_the_new_ones_do(
    start_service: StartService, tmp_path: Path
) -> None:
    config, hold = tmp_path / "held_back.py", tmp_path / "hold"
    config.write_text(HELD_BACK)
    service = start_service(
        WEB_CONCURRENCY="2", GUNICORN_CMD_ARGS=f"--config {config}", HOLD=str(hold)
    )
    old = service.booted()
    hold.touch()
    service.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(service.booted()) == 2 * len(old))
    for _ in range(10):  # over new connections
        assert readiness(service)[0] == 200
    assert all(worker.is_running() for worker in old)
    hold.unlink()
    psutil.wait_procs(old, timeout=30)
    assert readiness(service)[0] == 200
    assert len(service.booted()) == len(old)


FIRST_DIES = """
import os, runpy, signal

shipped = runpy.run_path("gunicorn.conf.py")
globals().update(shipped)

def post_fork(server, worker):
    try:
        os.unlink(os.environ["DIE"])  # only one worker finds the file
    except FileNotFoundError:
        shipped["post_fork"](server, worker)
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_new_worker_that_dies_is_replaced_by_a_new_one_and_not_by_an_old_one(
    start_service: StartService, tmp_path: Path
) -> None:
    config, die = tmp_path / "first_dies.py", tmp_path / "die"
    config.write_text(FIRST_DIES)
    service = start_service(
        WEB_CONCURRENCY="2", GUNICORN_CMD_ARGS=f"--config {config}", DIE=str(die)
    )
    old = service.booted()
    die.touch()
    service.process.send_signal(signal.SIGHUP)
    _, left = psutil.wait_procs(old, timeout=25)
    assert left == []
    assert readiness(service)[0] == 200
    assert len(service.booted()) == len(old)


def test_without_a_drain_delay_a_stopping_worker_is_not_ready(start_service: StartService) -> None:
    service = start_service()
    with requests.Session() as kept:
        assert readiness(service, kept)[0] == 200
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: readiness(service, kept)[0] == 503)
    assert service.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_does_not_drain(start_service: StartService, number: int) -> None:
    service = start_service(DRAIN_DELAY="1h")
    assert service.stop(number) == 0


def test_under_load_a_drained_stop_refuses_connections_and_fails_no_request(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    """Callers that leave once /readyz answers 503, as a load balancer does, lose no request."""
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2", DRAIN_DELAY="3s")
    with callers(service, 6, keep=True) as outcomes:
        eventually(lambda: len(outcomes) > 50)
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: readiness(service)[0] == 503)
    assert set(outcomes) == {200}
    assert service.process.wait(30) == 0


# --- reload, kill, upgrade


@pytest.mark.parametrize("keep", [True, False], ids=["reused connections", "new connections"])
def test_a_reload_under_load_fails_no_request_and_loses_no_count(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider, keep: bool
) -> None:
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2")
    with callers(service, 6, keep=keep) as outcomes:
        for starts in (4, 6, 8):
            reload(service, starts)
            eventually(lambda starts=starts: len(outcomes) > 10 * starts)
    assert set(outcomes) == {200}
    assert service.metric("notifications_total", outcome="delivered") == len(outcomes)
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


@pytest.mark.parametrize("variable", ["DB_PASSWORD_FILE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize(
    "break_it", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["removed", "emptied"]
)
def test_a_reload_with_an_unusable_file_is_refused_and_works_once_the_file_is_repaired(
    start_service: StartService,
    database: dict[str, str],
    tmp_path: Path,
    variable: str,
    break_it: Callable[[Path], object],
) -> None:
    content = {
        "DB_PASSWORD_FILE": database["DB_PASSWORD"].encode(),
        "REQUESTS_CA_BUNDLE": Path(certifi.where()).read_bytes(),
    }
    file = tmp_path / "file"
    file.write_bytes(content[variable])
    password = {"DB_PASSWORD": ""} if variable == "DB_PASSWORD_FILE" else {}
    service = start_service(**{variable: str(file)} | password)

    def refused() -> list[dict[str, Any]]:
        return [line for line in service.lines() if line["message"] == "not reloaded"]

    before = service.booted()
    for times in (1, 2):
        break_it(file)
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda times=times: len(refused()) == times)
        file.write_bytes(content[variable])
    assert {line["level"] for line in refused()} == {"ERROR"}
    assert all(line["problem"].startswith(f"{variable} ") for line in refused())
    assert service.booted() == before
    assert readiness(service)[0] == 200

    reload(service, starts=2)
    assert set(service.booted()).isdisjoint(before)
    assert readiness(service)[0] == 200
    assert service.stop() == 0


def test_every_worker_reports_the_counts_of_all_workers_including_dead_ones(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="3")

    def counts() -> set[float]:
        route = "/api/v1.0/recipient/<recipient>/notify"
        return {service.metric("http_server_requests_total", http_route=route) for _ in range(12)}

    def notify(times: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            replies = pool.map(lambda _: service.notify(), range(times))
            assert {reply.status_code for reply in replies} == {200}

    notify(350)
    assert counts() == {350}
    for number, total in ((signal.SIGKILL, 360), (signal.SIGTERM, 370)):
        victim = service.booted()[0]
        victim.send_signal(number)
        psutil.wait_procs([victim], timeout=20)
        service.wait_until_ready()
        notify(10)
        assert counts() == {total}
    reload(service, starts=8)
    notify(10)
    assert counts() == {380}
    assert not [labels for _, labels, _ in service.samples() if "pid" in labels]


def test_a_killed_worker_leaves_no_gauge_behind(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    gate, failing = Gate(), make_provider(answer(503))
    add_provider(failing.url)
    add_provider(make_provider(gate).url, priority=1)
    service = start_service(WEB_CONCURRENCY="2", CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP="1")
    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(service.notify) for _ in range(4)]
        gate.wait_for(4)
        assert service.metric("http_server_active_requests") == 4
        assert service.metric("circuit_breaker_state", host=failing.endpoint, state="open") == 1
        for worker in service.booted():
            worker.kill()
        assert all(isinstance(reply.exception(), requests.RequestException) for reply in under_way)
    gate.open()
    service.wait_until_ready()
    eventually(lambda: service.metric("http_server_active_requests") == 0)
    assert service.metric("circuit_breaker_state") == 0


def test_metrics_files_do_not_pile_up_when_workers_are_replaced(
    start_service: StartService,
) -> None:
    service = start_service(WEB_CONCURRENCY="2")
    (folder,) = metrics_folders(service)
    before = sorted(folder.iterdir())
    for starts in range(3, 7):
        victim = service.booted()[0]
        victim.kill()
        psutil.wait_procs([victim], timeout=20)
        eventually(lambda starts=starts: service.metric("worker_starts_total") == starts)
    assert sorted(folder.iterdir()) == before


def test_a_scrape_skips_the_empty_file_of_a_starting_worker(
    start_service: StartService,
) -> None:
    service = start_service()
    (folder,) = metrics_folders(service)
    (folder / "gauge_livesum_9.db").touch()
    assert service.metric("worker_starts_total") == 1


def test_a_deleted_metrics_folder_costs_counts_but_no_notification(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2")
    (folder,) = metrics_folders(service)
    shutil.rmtree(folder)
    assert service.notify().status_code == 200
    assert service.metric("worker_starts_total") == 1  # of the worker that answers
    victim = service.booted()[0]
    victim.kill()
    psutil.wait_procs([victim], timeout=20)
    eventually(lambda: list(folder.glob("counter_*.db")))
    eventually(lambda: service.metric("worker_starts_total") == 1)
    assert service.notify().status_code == 200


def test_each_master_has_its_own_metrics_folder_and_removes_it(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    """Also after a reload: then an upgrade passes on the variable that names the old folder."""
    add_provider(make_provider().url)
    service = start_service(PROMETHEUS_MULTIPROC_DIR="/no/such/folder")
    reload(service, starts=2)
    (folder,) = metrics_folders(service)

    with second_master(service):
        assert list(folder.glob("*.db"))
        assert service.stop() == 0
        assert not folder.exists()
        assert service.notify().status_code == 200
        assert service.metric("worker_starts_total") == 1
        _, new_folder = metrics_folders(service)
        assert new_folder.exists()
    assert not new_folder.exists()


@contextmanager
def second_master(service: Service) -> Iterator[psutil.Process]:
    """Send SIGUSR2, yield the new master once its workers count, and stop it at the end."""
    service.process.send_signal(signal.SIGUSR2)
    eventually(lambda: len(metrics_folders(service)) == 2)
    eventually(
        lambda: len([*metrics_folders(service)[1].glob("counter_*.db")]) == service.workers_wanted()
    )
    old = psutil.Process(service.process.pid)
    (master,) = (child for child in old.children() if child.children())
    try:
        yield master
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # the second ends a drain
            with contextlib.suppress(psutil.NoSuchProcess):
                master.send_signal(number)
        master.wait(30)


@pytest.mark.parametrize("keep", [True, False], ids=["reused connections", "new connections"])
def test_an_upgrade_fails_no_request_and_its_old_master_does_not_drain(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider, keep: bool
) -> None:
    """Both masters share the socket, so a 503 from the old one would count against the new one."""
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2", DRAIN_DELAY="1h")
    with second_master(service):
        with callers(service, 6, keep=keep) as outcomes:
            eventually(lambda: len(outcomes) > 20)
            assert service.stop() == 0
            served = len(outcomes)
            eventually(lambda: len(outcomes) > served + 20)
        assert set(outcomes) == {200}
        assert readiness(service)[0] == 200


def test_a_new_master_that_is_stopped_again_does_not_drain(start_service: StartService) -> None:
    service = start_service(DRAIN_DELAY="1h")
    with second_master(service) as master:
        master.send_signal(signal.SIGTERM)
        eventually(lambda: not master.is_running() or master.status() == psutil.STATUS_ZOMBIE)
        assert readiness(service)[0] == 200
    assert service.stop(signal.SIGINT) == 0


def test_the_service_does_not_start_with_preload_app(
    tmp_path: Path, server: dict[str, str]
) -> None:
    service = Service(tmp_path, server | {"GUNICORN_CMD_ARGS": "--preload"})
    assert service.process.wait(30) == 1
    assert "notifier cannot start: preload_app is set" in service.log.read_text()


def test_the_service_does_not_start_with_gunicorns_own_tls(
    tmp_path: Path, server: dict[str, str]
) -> None:
    service = Service(tmp_path, server | {"GUNICORN_CMD_ARGS": f"--certfile {certifi.where()}"})
    assert service.process.wait(30) == 1
    assert "notifier cannot start: certfile or keyfile is set" in service.log.read_text()


def test_a_command_ignores_the_metrics_folder_in_its_environment(server: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "notifier.app", "routes"],
        cwd=ROOT,
        env=clean_environment() | server | {"PROMETHEUS_MULTIPROC_DIR": "/no/such/folder"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "/metrics" in done.stdout


# --- the memory in which workers hand over the providers


def memory_of(process: psutil.Process) -> list[Path]:
    """Return the descriptors of the memory that the workers share."""
    links = [*Path(f"/proc/{process.pid}/fd").iterdir()]
    return [link for link in links if str(link.readlink()).startswith("/memfd:notifier")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_shared_memory_is_one_descriptor_without_a_file_however_many_workers_start(
    start_service: StartService,
) -> None:
    service = start_service(WEB_CONCURRENCY="2").wait_until_listening()
    master = psutil.Process(service.process.pid)
    before = master.num_fds()
    for number in range(1, 6):
        reload(service, 2 + 2 * number)
    service.wait_until_listening()
    assert master.num_fds() == before
    for process in (master, *service.booted()):
        (memory,) = memory_of(process)
        assert memory.stat().st_nlink == 0  # the memory has no name, so nothing outlives it
