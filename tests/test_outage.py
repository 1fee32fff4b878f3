"""PostgreSQL fails under load, in each way of `tools/faults.py`, and comes back.

Each outage happens once, and several tests check its effects. They have their own PostgreSQL, and
one service that runs from the first outage to the last.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import requests

from tests.service import Service
from tests.sockets import LOOPBACK
from tests.timing import eventually
from tools import faults, measure, rig
from tools.dev import postgres
from tools.dev.mock_provider import MockProvider
from tools.measure import FAULTS, WORKERS, Fault
from tools.rig import LISTENING, REFRESHED

# Seconds. No request waits for PostgreSQL, which hangs for longer.
REPLIED_WITHIN = 1.5
HANGING = 4.0

# Seconds. After so short an outage the longest backoff pause is 8 s.
HEARD_WITHIN = 15.0

# After a failure a worker retries both to listen and to read, with pauses that double from at least
# 0.25 s: at 0, 0.25, 0.75, 1.75, 3.75, 7.75, 15.75 s.
MOST_ATTEMPTS = 2 * 7

CACHE = "preference_cache_total"

HELD = 0.1  # seconds for which the stand-in for PostgreSQL holds a connection
Attempts = dict[int, list[float]]

BROKEN = {"the connection broke", "PostgreSQL ended the connection"}
AWAY = BROKEN | {"refused", "PostgreSQL is starting", "PostgreSQL is stopping"}
REASONS = {
    faults.stopped: AWAY,
    faults.killed: AWAY,
    faults.hanging: BROKEN | {"no answer in time"},
    faults.not_accepting: BROKEN | {"PostgreSQL does not accept connections"},
    faults.restarted: AWAY,
}

LASTING = [fault for fault in FAULTS if fault.seconds]
of_each_lasting_outage = pytest.mark.parametrize(
    "observed", LASTING, indirect=True, ids=lambda fault: fault.begin.__name__
)


@dataclass(frozen=True)
class Stage:
    """A service with three workers, its own PostgreSQL and its own providers."""

    server: postgres.Server
    email: list[MockProvider]
    folder: Path
    service: Service

    @contextmanager
    def another(self, **variables: str) -> Iterator[Service]:
        """Start another service, with one worker, on the same PostgreSQL."""
        ours = {"WEB_CONCURRENCY": "1", "LOG_LEVEL": "INFO"}
        service = Service(self.folder, postgres.serving(self.server.env) | ours | variables)
        try:
            yield service.wait_until_ready()
        finally:
            service.stop()

    def emails(self) -> int:
        return sum(provider.total for provider in self.email)


@pytest.fixture(scope="module")
def stage(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("outage")
    variables = {"WEB_CONCURRENCY": str(WORKERS), "CACHE_EXPIRED_TIME": "1s", "LOG_LEVEL": "INFO"}
    with ExitStack() as stack:
        server = postgres.acquire(ephemeral=True)
        stack.callback(server.close)
        *email, push = (stack.enter_context(MockProvider(name, 0)) for name in ("a", "b", "push"))
        measure.provide(server, email[0].url, push.url)
        service = Service(folder, postgres.serving(server.env) | variables)
        stack.callback(service.stop)
        service.wait_until_ready().wait_until_listening()
        yield Stage(server, email, folder, service)


class Observed:
    """An outage during which another service starts, and two changes after it."""

    def __init__(self, stage: Stage, fault: Fault, stack: ExitStack) -> None:
        self.fault = fault
        self._stage, self._url, self._stack = stage, stage.service.url, stack
        self.before, emails = rig.series(self._url), stage.emails()
        logged = len(stage.service.lines())
        meanwhile = self._meanwhile if fault.seconds else lambda: None
        self.outage = measure.outage(fault, stage.server, self._url, stage.email[1], meanwhile)
        self.emails = stage.emails() - emails
        self.changes = [*self._changes()]
        self.after = rig.series(self._url)
        self.lines = stage.service.lines()[logged:]

    def growth(self, name: str) -> float:
        """Return how much a series without labels has grown since before the outage."""
        return self.after[name] - self.before[name]

    def _meanwhile(self) -> None:
        """Start another service and probe it during the outage.

        Return once no worker listens and expired providers are served.
        """
        began, service = time.monotonic(), self._stage.service
        stale = service.metric(CACHE, result="stale")
        eventually(lambda: rig.series(self._url)[LISTENING] == 0)
        self.cold = self._stack.enter_context(self._stage.another())
        self.health, self.readiness = (
            requests.get(f"{self.cold.url}/{path}", timeout=10) for path in ("healthz", "readyz")
        )
        eventually(lambda: service.metric(CACHE, result="stale") > stale)
        if self.fault.begin is faults.hanging:
            time.sleep(max(0.0, HANGING - (time.monotonic() - began)))

    def _changes(self) -> Iterator[int]:
        """Make two changes; for each, yield how many messages then went to a wrong provider.

        A reload before expiry may read rows before the commit and keep them after it. The next
        reload has the change.
        """
        stage = self._stage
        service = rig.Service(self._url, stage.service.process.pid)
        for change in measure.changes(service, stage.server, stage.email, 2):
            committed = time.time()
            eventually(lambda since=committed: measure.all_hear(self._url, since))
            yield measure.astray(self._url, change.provider, 20)


@pytest.fixture(scope="module", params=FAULTS, ids=lambda fault: fault.begin.__name__)
def observed(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Observed]:
    with ExitStack() as stack:
        yield Observed(stage, request.param, stack)


def test_no_notification_fails_and_each_is_delivered_once(observed: Observed) -> None:
    replies = observed.outage.replies
    assert {reply.status for reply in replies} == {200}
    assert observed.emails == len(replies)


@of_each_lasting_outage
def test_expired_providers_are_served_at_once(observed: Observed) -> None:
    assert "serving expired preferences" in {line["message"] for line in observed.lines}
    assert max(reply.seconds for reply in observed.outage.replies) < REPLIED_WITHIN


def test_all_workers_hear_of_changes_again_in_time(observed: Observed) -> None:
    assert observed.outage.until_heard < HEARD_WITHIN
    assert observed.changes == [0, 0]
    assert observed.growth("preference_notifications_total") >= WORKERS * 2


def test_the_metrics_show_whether_the_workers_listen(observed: Observed) -> None:
    """During each lasting outage the metric was 0: `observed` waits for that."""
    assert (observed.before[LISTENING], observed.after[LISTENING]) == (1, 1)
    assert observed.after[REFRESHED] > observed.before[REFRESHED]
    assert observed.growth("preference_listener_reconnects_total") >= WORKERS


def test_the_log_has_a_reason_for_each_attempt_but_not_for_each_request(observed: Observed) -> None:
    errors = [line for line in observed.lines if line["level"] == "ERROR"]
    assert {line["message"] for line in errors} == {"database error"}
    assert {line["reason"] for line in errors} <= REASONS[observed.fault.begin]
    assert WORKERS <= len(errors) <= WORKERS * MOST_ATTEMPTS


@of_each_lasting_outage
def test_a_service_that_starts_in_an_outage_is_alive_but_not_ready_and_recovers_by_itself(
    observed: Observed,
) -> None:
    assert (observed.health.status_code, observed.readiness.status_code) == (200, 503)
    eventually(lambda: rig.all_hear(observed.cold.url))
    assert observed.cold.metric(CACHE, result="miss") == 0  # no request triggered the load
    assert observed.cold.notify().status_code == 200


# --- workers that start


def reloaded(service: Service) -> None:
    """Replace all workers."""
    old = service.booted()
    service.process.send_signal(signal.SIGHUP)
    psutil.wait_procs(old, timeout=60)


def restarted(service: Service) -> None:
    """Stop one worker; the master starts another one."""
    service.booted()[0].terminate()


def crashed(service: Service) -> None:
    """Kill one worker; the master starts another one."""
    service.booted()[0].kill()


@pytest.mark.parametrize(
    ("replaced", "allowed"),
    [(reloaded, {200}), (restarted, {200}), (crashed, {200, 0})],  # a crash cuts connections: 0
)
def test_workers_that_start_in_an_outage_serve_what_others_have_read(
    replaced: Callable[[Service], None], allowed: set[int], stage: Stage
) -> None:
    service = stage.service
    eventually(lambda: rig.all_hear(service.url), HEARD_WITHIN)
    with faults.stopped(stage.server):
        starts = service.metric("worker_starts_total")
        new = WORKERS if replaced is reloaded else 1
        with measure.load(service.url) as replies:
            replaced(service)
            eventually(lambda: service.metric("worker_starts_total") == starts + new)
            served = len(replies)
            eventually(lambda: len(replies) > served + 100)
        assert {reply.status for reply in replies} <= allowed
        for _ in range(10 * WORKERS):
            with requests.Session() as session:  # stays with one worker
                ready = session.get(f"{service.url}/readyz", timeout=10)
                assert ready.json()["checks"]["preferences"]["detail"] == "held in cache"
                assert (ready.status_code, service.notify(session=session).status_code) == (
                    200,
                    200,
                )
    eventually(lambda: rig.all_hear(service.url), HEARD_WITHIN)


def test_workers_that_end_after_many_requests_have_successors_that_serve(stage: Stage) -> None:
    variables = {"WEB_CONCURRENCY": "2", "GUNICORN_CMD_ARGS": "--max-requests 20"}
    with stage.another(**variables) as service:
        eventually(lambda: rig.all_hear(service.url))
        with faults.stopped(stage.server):
            starts = service.metric("worker_starts_total")
            assert {service.notify().status_code for _ in range(100)} == {200}
            assert service.metric("worker_starts_total") > starts
    eventually(lambda: rig.all_hear(stage.service.url), HEARD_WITHIN)


def test_providers_read_at_the_start_serve_even_if_no_request_came_before_the_outage(
    stage: Stage,
) -> None:
    with stage.another() as service:
        eventually(lambda: rig.all_hear(service.url))
        emails = stage.emails()
        with faults.not_accepting(stage.server):
            eventually(lambda: rig.series(service.url)[LISTENING] == 0)
            assert [service.notify().status_code for _ in range(10)] == [200] * 10
        assert stage.emails() == emails + 10
    eventually(lambda: rig.all_hear(stage.service.url), HEARD_WITHIN)


def test_without_listening_the_service_reads_again_by_itself_after_an_outage(stage: Stage) -> None:
    with stage.another(CACHE_INVALIDATION="off", CACHE_EXPIRED_TIME="1s") as service:
        with faults.not_accepting(stage.server):
            eventually(lambda: service.notify() and service.metric(CACHE, result="stale"))
            ended = time.time()
        eventually(lambda: service.metric(REFRESHED) > ended, HEARD_WITHIN)
    eventually(lambda: rig.all_hear(stage.service.url), HEARD_WITHIN)


# --- attempts and their backoff


@contextmanager
def standing_in(port: int, workers: list[psutil.Process]) -> Iterator[Attempts]:
    """Accept connections in PostgreSQL's place, hold each for a while, and close it.

    Yields the times at which each worker's attempts began, by process id.
    """
    attempts: Attempts = {worker.pid: [] for worker in workers}
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, port)))

        def take(sock: socket.socket, peer: int) -> None:
            began = time.monotonic()
            with sock:
                for worker in workers:
                    if peer in {one.laddr.port for one in worker.net_connections("tcp4")}:
                        attempts[worker.pid].append(began)
                time.sleep(HELD)

        def accept() -> None:
            with suppress(OSError), ThreadPoolExecutor() as pool:
                while True:
                    sock, (_, peer) = listener.accept()
                    pool.submit(take, sock, peer)

        thread = threading.Thread(target=accept)
        thread.start()
        stack.callback(thread.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # close() alone does not wake accept()
        yield attempts


def test_a_worker_makes_one_attempt_at_a_time_with_growing_pauses(stage: Stage) -> None:
    """Of ten attempts five are of one kind, to listen or to read, and take at least 3.75 s."""
    port, workers = int(stage.server.env["DB_PORT"]), stage.service.booted()
    with (
        faults.stopped(stage.server),
        measure.load(stage.service.url) as replies,
        standing_in(port, workers) as attempts,
    ):
        eventually(lambda: any(len(made) >= 10 for made in attempts.values()), 40)
    for made in attempts.values():
        assert min(after - before for before, after in pairwise(made)) >= HELD
        assert all(tenth - first > 3.5 for first, tenth in zip(made, made[9:], strict=False))
    assert len(replies) > 100
    assert {reply.status for reply in replies} == {200}
