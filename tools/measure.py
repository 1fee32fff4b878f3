"""`make measure`: how late workers see a change of providers, and what PostgreSQL's outages cost.

Starts its own PostgreSQL, mock providers and a service with three workers, all on loopback, and
prints two tables. The exit code is 1 if a notification failed, or if an email missed a provider
that all workers had read. The tests make the same outages, but shorter ones.
"""

import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests
from prometheus_client.multiprocess import MultiProcessCollector

from notifier.models import Channel
from notifier.settings import Settings, available_cpus
from notifier.store import migrations
from notifier.store.db import Database
from tools import faults, rig
from tools.dev import postgres
from tools.dev.mock_provider import MockProvider
from tools.rig import (
    MESSAGE,
    REFRESHED,
    Service,
    all_hear,
    concurrent_calls,
    owner,
    path_of,
    wait_until,
)

WORKERS = 3
CHANGES = 200
OUTAGE = 5.0

# After each CHANGES_PER_TRIAL changes, TRIAL emails show which provider they reach.
# They are enough to reach every worker.
CHANGES_PER_TRIAL, TRIAL = 20, 60

CALLERS, CALLERS_PAUSE = 4, 0.03  # seconds between a reply and the next request


# --- staleness


def replace_provider(database: Database, url: str) -> float:
    """Change the email provider's URL; return the time just before the commit was sent.

    The time after it would be too late: a listener may hear of the change before we hear of the
    commit.
    """
    with database.connect() as connection, connection.transaction():
        connection.execute(
            "UPDATE notification_preferences SET host = %s WHERE provider_type = 'Email'", (url,)
        )
        return time.time()


class Change(NamedTuple):
    """A provider that replaced another, and the seconds until all workers had read it."""

    provider: MockProvider
    seconds: float


def changes(
    running: Service, server: postgres.Server, providers: Sequence[MockProvider], count: int
) -> Iterator[Change]:
    """Let the providers replace each other `count` times.

    The time at which a worker read the change comes from its metrics file. `/metrics` shows only
    the oldest of these times, which is the fastest worker's, and polling it would load a worker.
    """
    gauges = _gauges(running.pid)

    def slowest(since: float) -> float:
        times = [_value(file, REFRESHED) for file in gauges]
        return max(times) if min(times) > since else 0.0

    for provider in islice(cycle(providers), count):
        committed = replace_provider(owner(server), provider.url)
        read = wait_until(partial(slowest, committed))
        yield Change(provider, read - committed)


def _gauges(pid: int) -> list[str]:
    """Return the metrics files with the workers' `livemin` gauges, one file per worker."""
    descendants = psutil.Process(pid).children(recursive=True)
    opened = {file.path for process in descendants for file in process.open_files()}
    return [path for path in opened if Path(path).name.startswith("gauge_livemin_")]


def _value(file: str, name: str) -> float:
    families = MultiProcessCollector.merge([file])  # type: ignore[no-untyped-call]
    return float(next(family.samples[0].value for family in families if family.name == name))


def astray(url: str, provider: MockProvider, messages: int = TRIAL) -> int:
    """Send emails over new connections; return how many did not reach `provider`."""
    before = provider.total
    with ThreadPoolExecutor(2 * CALLERS) as pool:
        [*pool.map(lambda _: _notify(requests, url, "buyer"), range(messages))]
    return messages - (provider.total - before)


# --- load


class Reply(NamedTuple):
    """The status and duration of a notification; the status is 0 without an answer."""

    status: int
    seconds: float


@contextmanager
def load(url: str) -> Iterator[list[Reply]]:
    """Notify over kept and over new connections during the block; yield the growing replies."""
    replies: list[Reply] = []
    stop = threading.Event()

    def call(recipient: str, keep: bool) -> None:
        with requests.Session() as session:
            while not stop.wait(CALLERS_PAUSE):
                replies.append(_notify(session if keep else requests, url, recipient))

    with concurrent_calls(CALLERS, call, stop):
        yield replies


def _notify(session: Any, url: str, recipient: str) -> Reply:
    began, status = time.monotonic(), 0
    with suppress(requests.RequestException):
        status = session.post(url + path_of(recipient), json=MESSAGE, timeout=30).status_code
    return Reply(status, time.monotonic() - began)


# --- outages


class Fault(NamedTuple):
    """A kind of outage, and its name in the table."""

    name: str
    begin: Callable[[postgres.Server], AbstractContextManager[None]]
    seconds: float = OUTAGE


FAULTS = (
    Fault("stopped: connections are refused", faults.stopped),
    Fault("killed, then recovers from the crash", faults.killed),
    Fault("hangs: every process is stopped by SIGSTOP", faults.hanging),
    Fault("does not accept connections", faults.not_accepting),
    Fault("restarted", faults.restarted, seconds=0.0),
)


class Outage(NamedTuple):
    """The cost of an outage; times are in seconds."""

    lasted: float
    replies: list[Reply]
    until_heard: float  # from its end until all workers had read a change and listened again

    @property
    def failed(self) -> int:
        """The number of notifications that were not delivered."""
        return sum(reply.status != HTTPStatus.OK for reply in self.replies)


def outage(
    fault: Fault,
    server: postgres.Server,
    url: str,
    provider: MockProvider,
    meanwhile: Callable[[], None],
) -> Outage:
    """Cause an outage under load while `meanwhile` runs, then change to `provider` at once."""
    with load(url) as replies:
        wait_until(lambda: len(replies) > CALLERS)
        began = time.monotonic()
        with fault.begin(server):
            meanwhile()
        ended = time.monotonic()
        committed = replace_provider(owner(server), provider.url)
        wait_until(lambda: all_hear(url, committed))
        until_heard = time.monotonic() - ended
    return Outage(ended - began, replies, until_heard)


# --- the tables


def main() -> int:
    """Print the figures; return the exit code."""
    return rig.exit_code("make measure", measure)


def measure() -> int:
    """Print both tables; return 1 if a notification failed or missed its provider."""
    with ExitStack() as stack:
        server = postgres.acquire(ephemeral=True)
        stack.callback(server.close)
        email = [stack.enter_context(MockProvider(f"email {number}", 0)) for number in (1, 2)]
        push = stack.enter_context(MockProvider("push", 0))
        provide(server, email[0].url, push.url)
        print(_machine(server), flush=True)
        with service(server) as running:
            lost = show_staleness(running, server, email)
        with service(server, CACHE_EXPIRED_TIME="1s") as running:
            lost += show_outages(running, server, email)
    return 1 if lost else 0


def service(server: postgres.Server, **variables: str) -> AbstractContextManager[Service]:
    """Run the service to be measured, with almost no logging."""
    return rig.service(server.env | {"LOG_LEVEL": "FATAL"} | variables, WORKERS)


def provide(server: postgres.Server, email: str, push: str) -> None:
    """Migrate the database, and add a provider for each channel."""
    migrations.migrate(Settings.from_env(server.env))
    rig.add_providers(owner(server), [(Channel.EMAIL, 0, email), (Channel.PUSH, 0, push)])


def _machine(server: postgres.Server) -> str:
    with owner(server).connect() as connection:
        (version,) = connection.execute("SHOW server_version").fetchall()[0]
    python = f"Python {platform.python_version()}"
    return f"{available_cpus()} CPUs, {python}, PostgreSQL {version}, {WORKERS} workers"


def show_staleness(running: Service, server: postgres.Server, email: Sequence[MockProvider]) -> int:
    """Print the table; return how many emails missed a provider that all workers had read."""
    _head(f"from COMMIT until all workers have read it, {CHANGES} changes", "median", "p99", "max")
    quiet, lost = [], 0
    for number, change in enumerate(changes(running, server, email, CHANGES), 1):
        quiet.append(change.seconds)
        if number % CHANGES_PER_TRIAL == 0:
            lost += astray(running.url, change.provider)
    _row("without load", *_spread(quiet))
    began = time.monotonic()
    with load(running.url) as replies:
        busy = [change.seconds for change in changes(running, server, email, CHANGES)]
    rate = len(replies) / (time.monotonic() - began)
    _row(f"with {rate:.0f} notifications per second", *_spread(busy))
    sent = CHANGES // CHANGES_PER_TRIAL * TRIAL
    print(f"\nOf {sent} emails sent right after a change, {lost} missed the new provider.")
    return lost


def _spread(seconds: list[float]) -> list[str]:
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return [
        f"{1000 * figure:.1f} ms" for figure in (percentiles[49], percentiles[98], max(seconds))
    ]


def show_outages(running: Service, server: postgres.Server, email: Sequence[MockProvider]) -> int:
    """Print the table; return how many notifications failed or missed a provider."""
    lost = 0
    _head("PostgreSQL", "outage", "requests", "failed", "slowest", "changes seen again after")
    for fault in FAULTS:
        wait = partial(time.sleep, fault.seconds)
        result = outage(fault, server, running.url, email[1], meanwhile=wait)
        lost += result.failed
        _row(
            fault.name,
            f"{result.lasted:.1f} s",
            str(len(result.replies)),
            str(result.failed),
            f"{1000 * max(reply.seconds for reply in result.replies):.0f} ms",
            f"{result.until_heard:.1f} s",
        )
        lost += sum(
            astray(running.url, change.provider) for change in changes(running, server, email, 2)
        )
    return lost


def _head(*cells: str) -> None:
    print()
    _row(*cells)
    _row(*("---" for _ in cells))


def _row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |".replace("| --- ", "|---"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
