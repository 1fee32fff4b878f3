"""`make measure`: how late a change of providers is seen, and what an outage of PostgreSQL costs.

Starts a PostgreSQL, mock providers and a service of three workers, all of its own and on loopback,
and prints two tables. The exit code is 1 if a notification failed, or missed a provider that all
workers knew of. The tests make the same outages, shorter.
"""

import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import requests
from prometheus_client.multiprocess import MultiProcessCollector

from notifier.models import Channel
from notifier.settings import Settings, available_cpus
from notifier.store import migrations
from notifier.store.db import Database
from tools import faults
from tools.dev import postgres
from tools.dev.mock_provider import MockProvider
from tools.faults import owner, wait_until

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
WORKERS = 3
CHANGES = 200
OUTAGE = 5.0

# After each so many changes so many messages show where they go; that many reach all workers.
CHANGES_PER_TRIAL, TRIAL = 20, 60

CALLERS, CALLERS_PAUSE = 4, 0.03  # seconds from a reply to the next request

REFRESHED = "preference_last_refresh_timestamp_seconds"
LISTENING = "preference_listener_connected"


class CannotMeasure(Exception):
    """Why there are no figures, in one line."""


# --- the service


class Service(NamedTuple):
    """A running service: where it is, and the process from which its own descend."""

    url: str
    pid: int


@contextmanager
def service(environment: dict[str, str], **variables: str) -> Iterator[Service]:
    """Run gunicorn on the database of `environment`, and wait until all workers listen.

    The guard stops it should we be killed.
    """
    with socket.create_server((HOST, 0)) as listener:
        bind = f"{HOST}:{listener.getsockname()[1]}"
    ours = {"WEB_CONCURRENCY": str(WORKERS), "LOG_LEVEL": "FATAL"}
    python = [sys.executable, "-m"]
    with subprocess.Popen(
        [*python, "tools.dev.guard", *python, "gunicorn", "--bind", bind],
        cwd=ROOT,
        env={"PATH": os.environ.get("PATH", os.defpath)} | ours | environment | variables,
        stdin=subprocess.PIPE,  # closed at the end of the block, which ends the service
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
    ) as process:
        running = Service(f"http://{bind}", process.pid)
        wait_until(lambda: _is_up(process, running))
        yield running


def _is_up(process: "subprocess.Popen[bytes]", running: Service) -> bool:
    if process.poll() is not None:
        raise CannotMeasure("the service has ended by itself")
    return len(_gauges(running.pid)) == WORKERS and all_hear(running.url)


def series(url: str) -> dict[str, float]:
    """Return every series without labels that the service shows on its page of metrics."""
    page = requests.get(f"{url}/metrics", timeout=10).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.MULTILINE)}


def all_hear(url: str, since: float = 0.0) -> bool:
    """Say whether all workers have read the providers since a time, and hear of the next change."""
    try:
        shown = series(url)
    except requests.ConnectionError:
        return False
    return shown.get(REFRESHED, 0.0) > since and shown.get(LISTENING) == 1


def replace_provider(database: Database, url: str) -> float:
    """Let the e-mail provider be at `url`; return the time just before the commit was sent.

    Not the time after it: who listens may hear of the change before we hear of the commit.
    """
    with database.connect() as connection, connection.transaction():
        connection.execute(
            "UPDATE notification_preferences SET host = %s WHERE provider_type = 'Email'", (url,)
        )
        return time.time()


# --- how late a change is seen


class Change(NamedTuple):
    """A provider that took another's place, as all workers knew after so many seconds."""

    provider: MockProvider
    seconds: float


def changes(
    running: Service, server: postgres.Server, providers: Sequence[MockProvider], count: int
) -> Iterator[Change]:
    """Let the providers replace each other, so many times.

    When a worker has read is in the file that it counts into. The page of metrics shows the oldest
    of these times, the fastest worker's, and would keep a worker busy.
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
    """Return the files that hold the workers' gauges of that kind, one for each worker."""
    descendants = psutil.Process(pid).children(recursive=True)
    opened = {file.path for process in descendants for file in process.open_files()}
    return [path for path in opened if Path(path).name.startswith("gauge_livemin_")]


def _value(file: str, name: str) -> float:
    families = MultiProcessCollector.merge([file])  # type: ignore[no-untyped-call]
    return float(next(family.samples[0].value for family in families if family.name == name))


def astray(url: str, provider: MockProvider, messages: int = TRIAL) -> int:
    """Send so many e-mails over new connections; return how many did not reach `provider`."""
    before = provider.total
    with ThreadPoolExecutor(2 * CALLERS) as pool:
        [*pool.map(lambda _: _notify(requests, url, "buyer"), range(messages))]
    return messages - (provider.total - before)


# --- load


class Reply(NamedTuple):
    """How a notification ended; the status is 0 if it got no answer."""

    status: int
    seconds: float


@contextmanager
def load(url: str) -> Iterator[list[Reply]]:
    """Notify buyers and sellers, over kept and over new connections; the list gets every reply."""
    replies: list[Reply] = []
    enough = threading.Event()

    def call(recipient: str, keep: bool) -> None:
        with requests.Session() as session:
            while not enough.wait(CALLERS_PAUSE):
                replies.append(_notify(session if keep else requests, url, recipient))

    with at_once(CALLERS, call, enough):
        yield replies


@contextmanager
def at_once(
    count: int, call: Callable[[str, bool], None], enough: threading.Event
) -> Iterator[None]:
    """Let `count` threads call, for a recipient and over kept connections or not, until `enough`.

    That is set at the end of the block, which raises what any of them has raised.
    """
    kinds = product(("buyer", "seller"), (True, False))
    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(call, *kind) for kind in islice(cycle(kinds), count)]
        try:
            yield
        finally:
            enough.set()
    for done in calls:
        done.result()


def _notify(session: Any, url: str, recipient: str) -> Reply:
    message = {"to": "someone@example.com", "title": "Sold", "message": "Your bicycle is sold."}
    began, status = time.monotonic(), 0
    with suppress(requests.RequestException):
        path = f"/api/v1.0/recipient/{recipient}/notify"
        status = session.post(url + path, json=message, timeout=30).status_code
    return Reply(status, time.monotonic() - began)


# --- outages


class Fault(NamedTuple):
    """A way to be away, as the table calls it."""

    name: str
    begin: Callable[[postgres.Server], AbstractContextManager[None]]
    seconds: float = OUTAGE


FAULTS = (
    Fault("stopped: connections are refused", faults.stopped),
    Fault("killed, and then recovers from the crash", faults.killed),
    Fault("hangs: every process has a SIGSTOP", faults.hanging),
    Fault("does not accept connections", faults.not_accepting),
    Fault("restarted", faults.restarted, seconds=0.0),
)


class Outage(NamedTuple):
    """What an outage cost; times are in seconds."""

    lasted: float
    replies: list[Reply]
    until_heard: float  # from its end until all workers had read a change, and hear of the next

    @property
    def failed(self) -> int:
        """How many notifications were not delivered."""
        return sum(reply.status != HTTPStatus.OK for reply in self.replies)


def outage(
    fault: Fault,
    server: postgres.Server,
    url: str,
    provider: MockProvider,
    meanwhile: Callable[[], None],
) -> Outage:
    """Make an outage under load, for as long as `meanwhile` takes.

    Then there is a change at once: to `provider`.
    """
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
    os.environ["no_proxy"] = "*"  # nothing here leaves the machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            return measure(stack)
    except (CannotMeasure, TimeoutError, postgres.PostgresError, psycopg.Error) as error:
        print(f"make measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def measure(stack: ExitStack) -> int:
    """Print both tables; return 1 if a notification was lost or went astray."""
    server = postgres.acquire(ephemeral=True)
    stack.callback(server.close)
    email = [stack.enter_context(MockProvider(f"email {number}", 0)) for number in (1, 2)]
    push = stack.enter_context(MockProvider("push", 0))
    provide(server, {Channel.EMAIL: email[0].url, Channel.PUSH: push.url})
    print(_machine(server), flush=True)
    with service(postgres.serving(server.env)) as running:
        lost = show_staleness(running, server, email)
    with service(postgres.serving(server.env), CACHE_EXPIRED_TIME="1s") as running:
        lost += show_outages(running, server, email)
    return 1 if lost else 0


def provide(server: postgres.Server, urls: Mapping[Channel, str]) -> None:
    """Bring the schema up to date and add a provider for each channel."""
    migrations.migrate(Settings.from_env(server.env))
    with owner(server).connect() as connection:
        connection.cursor().executemany(
            "INSERT INTO notification_preferences (provider_type, provider_name, host)"
            " VALUES (%s, 'a provider', %s)",
            [*urls.items()],
        )


def _machine(server: postgres.Server) -> str:
    with owner(server).connect() as connection:
        (version,) = connection.execute("SHOW server_version").fetchall()[0]
    python = f"Python {platform.python_version()}"
    return f"{available_cpus()} CPUs, {python}, PostgreSQL {version}, {WORKERS} workers"


def show_staleness(running: Service, server: postgres.Server, email: Sequence[MockProvider]) -> int:
    """Print the table; return how many e-mails missed a provider that all workers knew of."""
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
    _row(f"with {rate:.0f} notifications a second", *_spread(busy))
    sent = CHANGES // CHANGES_PER_TRIAL * TRIAL
    print(f"\nOf {sent} e-mails sent at once after changes {lost} missed the new provider.")
    return lost


def _spread(seconds: list[float]) -> list[str]:
    percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return [
        f"{1000 * figure:.1f} ms" for figure in (percentiles[49], percentiles[98], max(seconds))
    ]


def show_outages(running: Service, server: postgres.Server, email: Sequence[MockProvider]) -> int:
    """Print the table; return how many notifications failed, or missed a provider."""
    lost = 0
    _head("PostgreSQL", "away", "requests", "failed", "slowest", "changes heard again after")
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
