"""The stage of a run: the service and its surroundings, how each fault is made, and the run."""

import shlex
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from notifier.models import Channel
from tools import faults, machine, rig
from tools.chaos import callers
from tools.chaos.evidence import Delivery, Evidence, Limits, Period, read_logs, size
from tools.chaos.providers import ACCEPTS, Provider
from tools.chaos.rows import Rows
from tools.chaos.schedule import EVERYTHING, ROWS, STALL, Fault, Kinds, Schedule, Track, plan
from tools.crowd import crowd
from tools.dev import postgres

WARM_UP, CALM = 5.0, 10.0  # seconds of load before the chaos, and after it
PROVIDERS = 4  # per channel
WORKERS, THREADS = 3, 8
SILENT = 700  # callers: more than the workers have room for
ATTEMPT, DEADLINE, OPEN = 0.6, 1.8, 2.0
MARGIN = 1.0  # seconds that a loaded machine may add to a reply
MIN_RATE = 10  # requests per second

VARIABLES = {
    "WEB_THREADS": str(THREADS),
    "LOG_LEVEL": "DEBUG",
    "HTTP_CLIENT_TIMEOUT": f"{ATTEMPT}s",
    "NOTIFY_DEADLINE": f"{DEADLINE}s",
    "CACHE_EXPIRED_TIME": "2s",
    "CIRCUIT_BREAKER_WINDOW": "10s",
    "CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT": f"{OPEN}s",
}

CONFIG = Path(__file__).with_name("gunicorn_config.py")

FAULTS = {
    "PostgreSQL killed": faults.killed,
    "PostgreSQL hangs": faults.hanging,
    "PostgreSQL stopped": faults.stopped,
    "PostgreSQL does not accept": faults.not_accepting,
}


class Stage:
    """A service with its surroundings; `faults` counts the faults made."""

    def __init__(
        self,
        server: postgres.Server,
        service: rig.Service,
        rows: Rows,
        providers: list[Provider],
        log: machine.LogReader,
    ) -> None:
        self.service = service
        self.rows = rows
        self.kills: list[float] = []
        self.faults: Counter[str] = Counter()
        self._server = server
        self._log = log
        self._replaced: set[psutil.Process] = set()  # by the last reload
        self._providers = providers
        self._hosts = {provider.host for provider in providers}
        self._stopping = threading.Event()

    def run(self, schedule: Schedule) -> None:
        """Make every fault of the schedule; on return all of them have ended."""
        tracks = [
            (schedule.processes, self._process),
            (schedule.machine, self._machine),
            (schedule.database, self._database),
        ]
        for provider, track in zip(self._providers, schedule.providers, strict=True):
            tracks.append((track, partial(self._provider, provider)))
        began = time.monotonic()
        with ThreadPoolExecutor(len(tracks)) as pool:
            running = [pool.submit(self._follow, began, *track) for track in tracks]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                self._stopping.set()
        for done in running:
            done.result()

    def period(self, seconds: float) -> Period:
        """Let the load run for `seconds` without faults, then measure the workers."""
        began = time.time()
        time.sleep(seconds)
        return Period(began, time.time(), size(self.service.workers(), self._hosts))

    def _follow(self, began: float, track: Track, make: Callable[[Fault], None]) -> None:
        for fault in track:
            if self._stopping.wait(max(0.0, began + fault.at - time.monotonic())):
                return
            make(fault)

    def _process(self, fault: Fault) -> None:
        if fault.kind == "reload":
            self._replaced = {*self.service.workers()}
            self.service.master().send_signal(signal.SIGHUP)
        elif fault.kind == STALL:
            self._stall(fault.seconds)
        else:
            self._kill(fault.choice)
        self.faults[fault.kind] += 1

    def _stall(self, seconds: float) -> None:
        """Stall the reader of the workers' logs, once the last reload has ended."""
        rig.wait_until(lambda: not self._replaced & {*self.service.workers()})
        with self._log.stalled():
            self._stopping.wait(seconds)

    def _kill(self, choice: float) -> None:
        workers, began = self.service.workers(), time.time()
        with suppress(psutil.NoSuchProcess):  # a reload may just have ended it
            workers[int(choice * len(workers))].kill()
        self.kills.append(began)

    def _machine(self, fault: Fault) -> None:
        with machine.full_memory(self.service.master().pid):
            self._stopping.wait(fault.seconds)
        self.faults[fault.kind] += 1

    def _database(self, fault: Fault) -> None:
        if fault.kind in ROWS:
            self.faults[fault.kind] += self.rows.change(fault.kind, fault.choice)
            return
        with FAULTS[fault.kind](self._server):
            self._stopping.wait(fault.seconds)
        self.faults[fault.kind] += 1

    def _provider(self, provider: Provider, fault: Fault) -> None:
        provider.behaviour = fault.kind
        self._stopping.wait(fault.seconds)
        provider.behaviour = ACCEPTS

    @contextmanager
    def callers(self, kinds: Sequence[str]) -> Iterator[None]:
        """Keep the silent callers connected during the block, if they are among the kinds."""
        if not kinds:
            yield
            return
        with crowd(self.service.port, SILENT):
            yield
        self.faults.update(kinds)


@contextmanager
def stage(
    deliveries: list[Delivery], logs: Path, through: Sequence[str], **variables: str
) -> Iterator[Stage]:
    """Start everything on loopback; the workers' logs go to the folder `logs`.

    `through` is a command as for `rig.guarded`.
    """
    server = postgres.acquire(ephemeral=True)
    providers = [Provider(channel, deliveries) for channel in Channel for _ in range(PROVIDERS)]
    try:
        rows = Rows(server, providers)
        ours = {"GUNICORN_CMD_ARGS": shlex.join(["--config", str(CONFIG)]), "CHAOS_LOGS": str(logs)}
        with (
            machine.log_reader(logs) as log,
            rig.service(server.env | ours | variables, WORKERS, through=through) as service,
        ):
            yield Stage(server, service, rows, providers, log)
    finally:
        for provider in providers:
            provider.stop()
        server.close()


def run(
    seed: int,
    seconds: float,
    kinds: Kinds = EVERYTHING,
    warm_up: float = WARM_UP,
    calm: float = CALM,
) -> Evidence:
    """Start everything, make chaos for `seconds`, and return the evidence."""
    deliveries: list[Delivery] = []
    problem = machine.without_private_memory() if kinds.machine else ""
    if problem:
        kinds = replace(kinds, machine=())
    through = machine.private_memory() if kinds.machine else ()
    with tempfile.TemporaryDirectory(prefix="notifier-chaos-") as folder:
        logs = Path(folder)
        with (
            stage(deliveries, logs, through, **VARIABLES) as here,
            callers.load(here.service.url) as replies,
        ):
            before = here.period(warm_up)
            with here.callers(kinds.callers):
                here.run(plan(seed, seconds, PROVIDERS * len(Channel), kinds))
            rig.wait_until(lambda: rig.all_hear(here.service.url, here.rows.changed))
            time.sleep(ATTEMPT + OPEN + ATTEMPT)  # the last breakers open and close again
            after = here.period(calm)
            dropped = rig.series(here.service.url).get("log_lines_dropped_total", 0.0)
        lines = read_logs(logs)
    return Evidence(
        _limits(seconds, kinds),
        replies,
        deliveries,
        lines,
        here.rows.absences(),
        here.kills,
        here.faults,
        before,
        after,
        int(dropped),
        f"memory full: {problem}" if problem else "",
    )


def _limits(seconds: float, kinds: Kinds) -> Limits:
    return Limits(
        deadline=DEADLINE,
        margin=MARGIN,
        open_seconds=OPEN,
        threads=THREADS,
        callers=callers.CALLERS,
        hosts=PROVIDERS * len(Channel),
        kinds=kinds.all(),
        requests=int(MIN_RATE * seconds),
    )
