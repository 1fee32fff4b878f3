"""Shared by bench, chaos, measure and pressure: processes, the service, its database, callers.

Everything runs on loopback, belongs to the tool that started it, and stops with that tool.
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
from urllib.parse import urlsplit

import psutil
import psycopg
import requests

from notifier.models import Channel
from notifier.settings import Settings
from notifier.store.db import Database
from tools import HOST, ROOT
from tools.dev import guard, postgres

TIMEOUT = 60.0
POLL_INTERVAL = 0.05

REFRESHED = "preference_last_refresh_timestamp_seconds"
LISTENING = "preference_listener_connected"
STARTS = "worker_starts_total"

MESSAGE = {"to": "someone@example.com", "title": "Sold", "message": "Your bicycle is sold."}

Environment = dict[str, str]
Result = TypeVar("Result")


class CannotMeasure(Exception):
    """Measuring failed; the message says why in one line."""


# The errors that end a tool with one line instead of a traceback.
FAILURES = (
    CannotMeasure,
    PackageNotFoundError,
    OSError,  # includes TimeoutError and the errors of requests
    subprocess.SubprocessError,
    postgres.PostgresError,
    psycopg.Error,
)


def exit_code(name: str, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code; if it fails, print why in one line and return 1."""
    os.environ["no_proxy"] = "*"  # every connection stays on this machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return work()
    except FAILURES as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def wait_until(condition: Callable[[], Result]) -> Result:
    """Poll `condition` until its result is true, and return that result.

    The first poll comes after one interval.

    Raises:
        TimeoutError: the result was not true within `TIMEOUT`.
    """
    give_up = time.monotonic() + TIMEOUT
    while time.monotonic() < give_up:
        time.sleep(POLL_INTERVAL)
        if result := condition():
            return result
    raise TimeoutError(f"the expected state was not reached within {TIMEOUT:g} s")


# --- processes


class Guarded(NamedTuple):
    """A command that stops when this process ends: the process id of its guard, and its output."""

    pid: int
    output: IO[bytes]

    def alive(self) -> bool:
        """Return True while the command runs.

        Raises:
            CannotMeasure: the command has exited.
        """
        if psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
            return True
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        last = [line for line in lines if line][-1:]
        raise CannotMeasure(f"a started process has exited by itself: {' '.join(last)}")


@contextmanager
def guarded(
    command: Sequence[str],
    variables: Environment,
    folder: Path = ROOT,
    through: Sequence[str] = (),
) -> Iterator[Guarded]:
    """Run a Python module in a folder; this checkout's guard stops it if we are killed.

    `through` is a command that prepares its process, and then executes its arguments in it.
    """
    python = [*through, sys.executable, "-m"]
    with (
        TemporaryFile() as output,
        subprocess.Popen(
            [sys.executable, guard.__file__, *python, *command],
            cwd=folder,
            env=with_path(variables),
            stdin=subprocess.PIPE,  # closing it at the end of the block stops the command
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C must not reach it
        ) as process,
    ):
        yield Guarded(process.pid, output)


def with_path(variables: Environment) -> Environment:
    """Return these variables and our PATH, without the rest of our environment."""
    return {"PATH": os.environ.get("PATH", os.defpath)} | variables


def port_of(url: str) -> int:
    """Return the port of a URL that names one."""
    return urlsplit(url).port or 0


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


# --- the service


class Service(NamedTuple):
    """A running service: its URL, and the process id of its guard."""

    url: str
    pid: int

    @property
    def port(self) -> int:
        """The port it listens on."""
        return port_of(self.url)

    def master(self) -> psutil.Process:
        """Return gunicorn's master."""
        (master,) = psutil.Process(self.pid).children()
        return master

    def workers(self) -> list[psutil.Process]:
        """Return the workers that run now, by process id."""
        return sorted(self.master().children(), key=lambda worker: worker.pid)


@contextmanager
def service(
    environment: Environment,
    workers: int,
    app: str = "",
    folder: Path = ROOT,
    through: Sequence[str] = (),
) -> Iterator[Service]:
    """Run a checkout's service as operators do, and wait until all workers listen for changes.

    `through` is a command as for `guarded`.
    """
    bind = f"{HOST}:{free_port()}"
    command = ["gunicorn", *([app] if app else []), "--bind", bind]
    variables = postgres.serving(environment) | {"WEB_CONCURRENCY": str(workers)}
    with guarded(command, variables, folder, through) as running:
        url = f"http://{bind}"
        wait_until(lambda: running.alive() and all_hear(url, workers=workers))
        yield Service(url, running.pid)


def series(url: str) -> dict[str, float]:
    """Return every series without labels that the service's `/metrics` shows."""
    page = requests.get(f"{url}/metrics", timeout=10).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page, re.MULTILINE)}


def all_hear(url: str, since: float = 0.0, workers: int = 1) -> bool:
    """Return whether all workers listen for changes and have read the providers after `since`.

    At least `workers` workers must have started.
    """
    try:
        shown = series(url)
    except requests.ConnectionError:
        return False
    refreshed, listening, starts = (shown.get(n, 0.0) for n in (REFRESHED, LISTENING, STARTS))
    return refreshed > since and listening == 1 and starts >= workers


# --- the database


def owner(server: postgres.Server, **variables: str) -> Database:
    """Return the database, connected as the role that owns it and may change rows."""
    return Database.migrating(Settings.from_env(server.env | variables))


def add_providers(database: Database, rows: Iterable[tuple[Channel, int, str]]) -> None:
    """Insert a provider for each channel, priority and URL."""
    with database.connect() as connection:
        connection.cursor().executemany(
            "INSERT INTO notification_preferences"
            " (provider_type, provider_name, priority, host, secret_key)"
            " VALUES (%s, 'a provider', %s, %s, '0123456789abcdef')",
            [*rows],
        )


# --- callers


@contextmanager
def concurrent_calls(
    count: int, call: Callable[[str, bool], None], stop: threading.Event
) -> Iterator[None]:
    """Run `call(recipient, keep)` in `count` threads, with every combination of arguments.

    `keep` says whether to keep the connection. The end of the block sets `stop`, waits for the
    threads, and raises what a thread has raised.
    """
    kinds = product(("buyer", "seller"), (True, False))
    with ThreadPoolExecutor(count) as pool:
        calls = [pool.submit(call, *kind) for kind in islice(cycle(kinds), count)]
        try:
            yield
        finally:
            stop.set()
    for done in calls:
        done.result()


def path_of(recipient: str) -> str:
    """Return the path that takes notifications for a recipient."""
    return f"/api/v1.0/recipient/{recipient}/notify"
