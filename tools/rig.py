"""Shared parts of bench, chaos and measure: processes, the service, its database, its callers.

Everything is on loopback, belongs to whoever starts it, and ends with it.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from itertools import cycle, islice, product
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple, TypeVar

import psutil
import psycopg
import requests

from notifier.models import Channel
from notifier.settings import Settings
from notifier.store.db import Database
from tools import HOST, ROOT
from tools.dev import guard, postgres

PATIENCE = 60.0
POLLING = 0.05

REFRESHED = "preference_last_refresh_timestamp_seconds"
LISTENING = "preference_listener_connected"
STARTS = "worker_starts_total"

MESSAGE = {"to": "someone@example.com", "title": "Sold", "message": "Your bicycle is sold."}

Environment = dict[str, str]
Result = TypeVar("Result")


class CannotMeasure(Exception):
    """Why there are no figures, in one line."""


# Why there is nothing to report.
FAILURES = (
    CannotMeasure,
    PackageNotFoundError,
    OSError,  # those of requests, and TimeoutError, too
    subprocess.SubprocessError,
    postgres.PostgresError,
    psycopg.Error,
)


def exit_code(name: str, work: Callable[[], int]) -> int:
    """Return what `work` returns; if it fails say why, in one line, and return 1."""
    os.environ["no_proxy"] = "*"  # nothing here leaves the machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except FAILURES as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def wait_until(condition: Callable[[], Result]) -> Result:
    """Return what `condition` returns once that is true; it is asked gently, and not at once.

    Raises:
        TimeoutError: it takes too long.
    """
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        time.sleep(POLLING)
        if result := condition():
            return result
    raise TimeoutError(f"the expected state did not come within {PATIENCE:g} s")


# --- processes


class Guarded(NamedTuple):
    """A command that ends with us: the process from which its own descend, and its output."""

    pid: int
    output: IO[bytes]

    def alive(self) -> bool:
        """Return True.

        Raises:
            CannotMeasure: the command has ended.
        """
        if psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
            return True
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        last = [line for line in lines if line][-1:]
        raise CannotMeasure(f"a process that was started has ended by itself: {' '.join(last)}")


@contextmanager
def guarded(
    command: Sequence[str], variables: Environment, folder: Path = ROOT
) -> Iterator[Guarded]:
    """Run a Python module in a folder; the guard, always ours, stops it should we be killed."""
    python = [sys.executable, "-m"]
    with (
        TemporaryFile() as output,
        subprocess.Popen(
            [sys.executable, guard.__file__, *python, *command],
            cwd=folder,
            env=path_and(variables),
            stdin=subprocess.PIPE,  # closed at the end of the block, which ends the command
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        ) as process,
    ):
        yield Guarded(process.pid, output)


def path_and(variables: Environment) -> Environment:
    """Return these variables and our PATH: nothing else of our environment."""
    return {"PATH": os.environ.get("PATH", os.defpath)} | variables


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


# --- the service


class Service(NamedTuple):
    """A running service: where it is, and the process from which its own descend."""

    url: str
    pid: int


@contextmanager
def service(
    environment: Environment, workers: int, app: str = "", folder: Path = ROOT
) -> Iterator[Service]:
    """Run the service of a folder as operators do, and wait until all workers hear of changes."""
    bind = f"{HOST}:{free_port()}"
    command = ["gunicorn", *([app] if app else []), "--bind", bind]
    variables = postgres.serving(environment) | {"WEB_CONCURRENCY": str(workers)}
    with guarded(command, variables, folder) as running:
        url = f"http://{bind}"
        wait_until(lambda: running.alive() and all_hear(url, workers=workers))
        yield Service(url, running.pid)


def series(url: str) -> dict[str, float]:
    """Return every series without labels that the service shows on its page of metrics."""
    page = requests.get(f"{url}/metrics", timeout=10).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.MULTILINE)}


def all_hear(url: str, since: float = 0.0, workers: int = 1) -> bool:
    """Say whether all workers have read the providers since a time, and hear of the next change.

    At least so many `workers` must have started by then.
    """
    try:
        shown = series(url)
    except requests.ConnectionError:
        return False
    refreshed, listening, starts = (shown.get(n, 0.0) for n in (REFRESHED, LISTENING, STARTS))
    return refreshed > since and listening == 1 and starts >= workers


# --- the database


def owner(server: postgres.Server, **variables: str) -> Database:
    """Return the database as the role that may change rows and that takes connections."""
    return Database.migrating(Settings.from_env(server.env | variables))


def add_providers(database: Database, rows: Iterable[tuple[Channel, int, str]]) -> None:
    """Add a provider for each channel, priority and URL."""
    with database.connect() as connection:
        connection.cursor().executemany(
            "INSERT INTO notification_preferences"
            " (provider_type, provider_name, priority, host, secret_key)"
            " VALUES (%s, 'a provider', %s, %s, '0123456789abcdef')",
            [*rows],
        )


# --- callers


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


def path_of(recipient: str) -> str:
    """Return where the service takes notifications for a recipient."""
    return f"/api/v1.0/recipient/{recipient}/notify"
