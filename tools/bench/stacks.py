"""The stacks to measure; each runs in processes of its own, whose cost can be measured."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
from psycopg import sql

from notifier.models import Channel
from tools import HOST, ROOT, rig
from tools.dev import postgres
from tools.rig import (
    CannotMeasure,
    Environment,
    free_port,
    owner,
    port_of,
    wait_until,
    with_path,
)

WORKERS, THREADS = 2, 32

# gunicorn's threaded worker, with the keep-alive of gunicorn.conf.py.
GTHREAD = ("--worker-class", "gthread", "--keep-alive", "75", "--no-control-socket")

OPENED = re.compile(r'^circuit_breaker_state_changes_total{.*to_state="open"} (\S+)$', re.MULTILINE)


class App(NamedTuple):
    """An app to compare with: its module in this package, and the options of its server."""

    module: str
    options: tuple[str, ...]
    by_uvicorn: bool = False


BARE, NAIVE = App("bare", GTHREAD), App("naive", GTHREAD)

# uvicorn as `pip install uvicorn` has it, and with the packages of its extra `standard`.
QUIET = ("--log-level", "warning", "--no-access-log")
ASGI = App("asgi", ("--loop", "asyncio", "--http", "h11", *QUIET), by_uvicorn=True)
ASGI_UVLOOP = App("asgi", ("--loop", "uvloop", "--http", "httptools", *QUIET), by_uvicorn=True)


class MemoryUse(NamedTuple):
    """Megabytes of the workers alone, and with the master."""

    workers: float
    total: float


class Stack(NamedTuple):
    """A running stack: its port, and its guard's process id, or None if no cost is counted."""

    port: int
    guard: int | None = None

    def processes(self) -> list[psutil.Process]:
        """Return the master and the workers."""
        return [*psutil.Process(self.guard).children(recursive=True)] if self.guard else []

    def pids(self) -> list[int]:
        """Return the ids of the processes whose CPU is counted."""
        return [process.pid for process in self.processes()]

    def workers(self) -> list[int]:
        """Return the ids of the workers, without the master."""
        (master,) = psutil.Process(self.guard).children()
        return [process.pid for process in master.children()]

    def memory(self) -> MemoryUse:
        """Return the memory in use; each process counts its part of shared memory (PSS)."""
        processes = self.processes()
        masters = psutil.Process(self.guard).children()
        total, master = (sum(map(_megabytes, some)) for some in (processes, masters))
        return MemoryUse(total - master, total)


def _megabytes(process: psutil.Process) -> float:
    info = process.memory_full_info()
    return float(getattr(info, "pss", info.uss)) / 1e6  # macOS has no PSS


@contextmanager
def sink() -> Iterator[dict[str, str]]:
    """Run the mock providers; yield the URL of each kind."""
    with subprocess.Popen(
        [sys.executable, "-m", "tools.bench.sink"],
        cwd=ROOT,
        stdin=subprocess.PIPE,  # closing it at the end of the block stops the process
        stdout=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C must not reach it
    ) as process:
        ports = json.loads(process.stdout.readline()) if process.stdout else {}
        yield {name: f"http://{HOST}:{port}/send" for name, port in ports.items()}


@contextmanager
def compared(app: App, url: str, workers: int = WORKERS, threads: int = THREADS) -> Iterator[Stack]:
    """Run `app` with the provider at `url`."""
    variables = {"PROVIDER_URL": url, "THREADS": str(threads)}
    port = free_port()
    target = f"tools.bench.{app.module}:app"
    command = ["gunicorn", target, "--config", os.devnull, "--bind", f"{HOST}:{port}"]
    command += ["--threads", str(threads)]
    if app.by_uvicorn:
        command = ["uvicorn", target, "--port", str(port)]
    command += ["--workers", str(workers), *app.options]
    with rig.guarded(command, variables) as running:
        stack = Stack(port, running.pid)
        wait_until(lambda: running.alive() and len(stack.pids()) > workers and _answers(port))
        yield stack


@contextmanager
def service(
    database: Environment,
    app: str = "",
    workers: int = WORKERS,
    threads: int = THREADS,
    checkout: Path = ROOT,
) -> Iterator[Stack]:
    """Run a checkout's service on `database` as operators do, with its log in a file."""
    variables = {
        "WEB_THREADS": str(threads),
        # A breaker that opens stays open while the stack is measured.
        "CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT": "1h",
    }
    with rig.service(database | variables, workers, app, checkout) as running:
        yield Stack(running.port, running.pid)


def provider(url: str) -> Stack:
    """Return a provider as a stack whose cost is not counted."""
    return Stack(port_of(url))


def breakers_opened(stack: Stack) -> int:
    """Return how often breakers have opened, over all workers and hosts."""
    page = requests.get(f"http://{HOST}:{stack.port}/metrics", timeout=10).text
    return round(sum(float(count) for count in OPENED.findall(page)))


def _answers(port: int) -> bool:
    with suppress(requests.ConnectionError):
        return (
            requests.get(f"http://{HOST}:{port}/", timeout=10).status_code == HTTPStatus.NOT_FOUND
        )
    return False


def database(
    server: postgres.Server, email: Sequence[str], push: str, checkout: Path = ROOT
) -> Environment:
    """Create a database with providers at these URLs, email's in order; return its `DB_*`.

    Its schema is the checkout's.
    """
    name = f"bench_{uuid.uuid4().hex[:8]}"
    with owner(server).connect() as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    environment = server.env | {"DB_NAME": name}
    _migrate(environment, checkout)
    rows = [(Channel.EMAIL, place, url) for place, url in enumerate(email)]
    rig.add_providers(owner(server, DB_NAME=name), [*rows, (Channel.PUSH, 0, push)])
    return environment


def _migrate(environment: Environment, checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "notifier.app", "migrate"],
        check=False,
        cwd=checkout,
        env=with_path(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:]
        raise CannotMeasure(f"the database of {checkout} was not migrated: {' '.join(last)}")
