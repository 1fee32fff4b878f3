"""`make run`: runs the service, PostgreSQL and the sandbox in one terminal until Ctrl-C.

python -m tools.dev.run [BEGAN]    # BEGAN: when the command began, in seconds since 1970
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

import psycopg
import requests

from notifier.errors import Refused
from notifier.settings import Settings, SettingsError
from notifier.store import migrations
from notifier.store.db import Database, first_line
from notifier.store.roles import NotGranted
from tools import HOST, ROOT
from tools.dev import ports, postgres, seed
from tools.dev.output import Log, Output
from tools.dev.readable import painted
from tools.dev.sandbox import Sandbox
from tools.dev.seed import Mock

READY_WITHIN = 30.0

EXAMPLE = '{"to": "seller@example.com", "title": "Sold", "message": "Your bicycle is sold."}'

FAREWELL = (
    "stopped; the database keeps the providers, the sandbox forgets its messages and switches"
)

# Lets the other variables be checked before a server is started.
_ANY_DATABASE = dict.fromkeys(("DB_HOST", "DB_NAME", "DB_USERNAME", "DB_PASSWORD"), "later") | {
    "DB_PORT": "5432"
}

Environment = dict[str, str]


class CannotRun(Exception):
    """`make run` cannot start; the message gives the reason in one line."""


# Errors whose message is one line for the user.
_EXPLAINED = (
    CannotRun,
    NotGranted,
    Refused,
    SettingsError,
    ports.PortError,
    postgres.PostgresError,
)


def main() -> int:
    """Run until a signal, or until the service ends; return the exit code."""
    began = time.monotonic() - (time.time() - float(sys.argv[1]) if sys.argv[1:] else 0.0)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # No exception: it could come between a start and the entry of its end in the stack.
        signal.signal(number, lambda *_: stopping.set())
    output, problem = Output(sys.stdout.fileno()), None
    try:
        with ExitStack() as stack:
            run(stack, output, stopping, began)
        output.say(FAREWELL)
    except _EXPLAINED as error:
        problem = str(error)
    except psycopg.Error as error:
        problem = first_line(error)
    finally:
        output.close()
    if problem:
        print(f"make run: {problem}", file=sys.stderr)
    return 1 if problem else 0


def run(stack: ExitStack, output: Output, stopping: threading.Event, began: float) -> None:
    """Start everything, put the end of each part on `stack`, and wait for a reason to stop.

    Args:
        began: when the command began, on `time.monotonic()`.
    """
    surroundings = _surroundings()
    environment = _environment()
    if ignored := postgres.ignored(os.environ):
        output.say(ignored)
    settings = Settings.from_env(_ANY_DATABASE | environment)
    mocks = ports.mocks(environment)
    ports.check(settings, mocks)
    environment, secret = _database(stack, output, environment)
    settings = Settings.from_env(environment)
    if stopping.is_set():
        return
    output.say("3/4 preparing the database")
    _prepare(output, settings, mocks)
    if stopping.is_set():
        return
    output.say("4/4 starting the sandbox and the service")
    sandbox = _sandbox(stack, settings, mocks)
    service = _start_service(stack, environment, Log(output, sandbox.heard))
    if _until_ready(service, settings, stopping):
        output.say(_welcome(output, settings, mocks, secret, time.monotonic() - began))
    while not stopping.wait(0.2) and _surroundings() == surroundings:
        if service.poll() is not None:
            raise CannotRun("the service ended unexpectedly: see its last log lines")
    output.say("stopping; press Ctrl-C again to abort the requests in progress")


def _surroundings() -> tuple[int, bool]:
    """Return our parent and whether there is a terminal.

    If make is killed or its terminal is closed, no signal reaches us, but one of these changes.
    """
    return os.getppid(), os.isatty(0)


def _environment() -> Environment:
    """Return the variables that are set; without DB_HOST, none that describes a database."""
    environment = {name: value for name, value in os.environ.items() if value.strip()}
    environment |= postgres.unproxied(environment)
    return environment if "DB_HOST" in environment else postgres.without_database(environment)


def _database(
    stack: ExitStack, output: Output, environment: Environment
) -> tuple[Environment, Path | None]:
    """Return the environment with a database, and where its password is if that is our own."""
    if "DB_HOST" in environment:
        output.say("2/4 using the PostgreSQL of DB_HOST")
        return environment, None
    output.say("2/4 starting PostgreSQL")
    server = postgres.acquire()
    stack.callback(server.close)
    _lock(stack, server.base / "run.lock")
    return environment | server.env, server.base / "password"


def _lock(stack: ExitStack, path: Path) -> None:
    """Make sure that no other `make run` uses the database: its providers' rows name our ports."""
    file = stack.enter_context(path.open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CannotRun(
            f"another make run uses the database in {path.parent}: "
            "stop it, or set EMBEDDED_PG_DIR to another directory"
        ) from None


def _prepare(output: Output, settings: Settings, mocks: Sequence[Mock]) -> None:
    """Bring the schema up to date, and let the mock providers' rows name their ports."""
    for notice in migrations.migrate(settings).notices:
        output.say(f"    {notice}")
    database = Database.migrating(settings)
    if not seed.add_rows(database, mocks, HOST):
        moved = seed.move_rows(database, mocks, HOST)
        for mock in mocks:
            if mock.name in moved:
                output.say(f"    the provider {mock.name} moved to port {mock.port}")
        if not seed.has_rows(database, mocks, HOST):
            output.say("    the database has other providers already: the mock ones are not added")


def _sandbox(stack: ExitStack, settings: Settings, mocks: Sequence[Mock]) -> Sandbox:
    places = [(mock.name, mock.port) for mock in mocks]
    try:
        return stack.enter_context(Sandbox(places, _url(settings.http_server_port)))
    except OSError as error:
        raise CannotRun(f"the sandbox cannot start: {error.strerror}") from None


def _start_service(
    stack: ExitStack, environment: Environment, log: Log
) -> "subprocess.Popen[bytes]":
    # The service gets a session of its own: the terminal's Ctrl-C reaches only us, and we ask the
    # service to stop once. If we are killed, the guard stops the service.
    python = [sys.executable, "-m"]
    service = subprocess.Popen(
        [*python, "tools.dev.guard", *python, "gunicorn"],
        cwd=ROOT,
        env=postgres.serving(environment) | {"HTTP_SERVER_HOST": HOST},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    log.follow(cast("IO[bytes]", service.stdout))
    stack.callback(_stop_service, service, log)
    return service


def _stop_service(service: "subprocess.Popen[bytes]", log: Log) -> None:
    """Let the requests in progress finish; a further signal aborts them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: service.send_signal(signal.SIGINT))
    if service.stdin:
        service.stdin.close()
    service.wait()
    with contextlib.suppress(OSError):  # a guard that was killed has left its command behind
        os.killpg(service.pid, signal.SIGTERM)
    log.wait()


def _until_ready(
    service: "subprocess.Popen[bytes]", settings: Settings, stopping: threading.Event
) -> bool:
    """Wait until the service answers; return False if it ended or is to stop."""
    url = f"{_url(settings.http_server_port)}/healthz"
    give_up = time.monotonic() + READY_WITHIN
    while service.poll() is None and not stopping.wait(0.1):
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(url, timeout=1, proxies={"no_proxy": "*"}).ok:
                return True
        if time.monotonic() > give_up:
            raise CannotRun(f"the service does not answer within {READY_WITHIN:g} s")
    return False


def _welcome(
    output: Output, settings: Settings, mocks: Sequence[Mock], secret: Path | None, seconds: float
) -> str:
    ready, page = f"ready in {int(seconds)} s", f"{_url(mocks[0].port)}/"
    if output.colour:
        ready, page = painted("1;32", ready), painted("1", page)
    providers = ", ".join(f"{mock.name} :{mock.port}" for mock in mocks)
    username, _ = settings.migrating_role  # who may change the rows
    database = f"{username}@{settings.db_host}:{settings.db_port}/{settings.db_name}"
    password = f" (password in {_from_here(secret)})" if secret else ""
    return f"""
{ready}

    sandbox    {page}
    service    {_url(settings.http_server_port)}/
    providers  {providers}
    PostgreSQL {database}{password}

Open the sandbox in a browser, or notify a seller from another terminal:

    curl -i {HOST}:{settings.http_server_port}/api/v1.0/recipient/seller/notify \\
      -d '{EXAMPLE}'

./notify --help shows how to list and change the providers. Ctrl-C stops everything.
"""


def _from_here(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"


if __name__ == "__main__":
    sys.exit(main())
