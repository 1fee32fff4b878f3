"""`make run`: the service and all it needs, in one terminal, gone with one Ctrl-C."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import psycopg
import requests

from notifier.settings import Settings, SettingsError
from notifier.store import migrations
from notifier.store.db import Database, first_line
from notifier.store.roles import NotGranted
from tools import HOST, ROOT
from tools.dev import postgres, seed
from tools.dev.mock_provider import MockProvider
from tools.dev.seed import PROVIDERS, Mock

READY_WITHIN = 30.0

EXAMPLE = '{"to": "seller@example.com", "title": "Sold", "message": "Your bicycle is sold."}'


class CannotRun(Exception):
    """Why `make run` does not work here, in one line."""


def main() -> int:
    """Run until a signal, or until the service ends; return the exit code."""
    began = _surroundings()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A flag, not an exception: that could come between a start and the note to stop it again.
        signal.signal(number, lambda *_: stopping.set())
    try:
        with ExitStack() as stack:
            return run(stack, stopping, began)
    except (CannotRun, NotGranted, SettingsError, postgres.PostgresError) as error:
        print(f"make run: {error}", file=sys.stderr)
    except psycopg.Error as error:
        print(f"make run: {first_line(error)}", file=sys.stderr)
    return 1


def _surroundings() -> tuple[int, bool]:
    """Return our parent and whether there is a terminal.

    A make that is killed, or whose terminal is closed, does not pass that on; either changes this.
    """
    return os.getppid(), os.isatty(0)


def run(stack: ExitStack, stopping: threading.Event, began: tuple[int, bool]) -> int:
    """Start everything, each with its end noted in `stack`, and wait."""
    environment = {name: value for name, value in os.environ.items() if value.strip()}
    others = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    environment["no_proxy"] = f"{others},{HOST}"  # where all of ours is
    own_database = "DB_HOST" not in environment
    if own_database:
        environment = postgres.without_database(environment) | _ANY_DATABASE
    settings = Settings.from_env(environment)
    _check_ports(settings)
    where = ""
    if own_database:
        server = postgres.acquire()
        stack.callback(server.close)
        environment |= server.env
        settings = Settings.from_env(environment)
        where = f" (password in {server.base / 'password'})"
    for notice in migrations.migrate(settings).notices:
        print(notice, flush=True)
    seed.add_rows(Database.migrating(settings), PROVIDERS, HOST)
    for mock in PROVIDERS:
        stack.enter_context(_mock_provider(mock))
    service = _start_service(stack, environment, settings)
    if _until_ready(service, settings, stopping):
        print(_welcome(settings, where), flush=True)
    while not stopping.wait(0.2) and _surroundings() == began:
        if service.poll() is not None:
            raise CannotRun("the service has ended by itself; its last lines say why")
    return 0


# Lets the other variables be checked before a server is started.
_ANY_DATABASE = dict.fromkeys(("DB_HOST", "DB_NAME", "DB_USERNAME", "DB_PASSWORD"), "later") | {
    "DB_PORT": "5432"
}


def _mock_provider(mock: Mock) -> MockProvider:
    try:
        return MockProvider(mock.name, mock.port)
    except OSError as error:
        raise CannotRun(_no_port(mock.port, f'the mock provider "{mock.name}"', error)) from None


def _check_ports(settings: Settings) -> None:
    wanted = {mock.port: f'the mock provider "{mock.name}"' for mock in PROVIDERS}
    if settings.http_server_port in wanted:
        taken_by = wanted[settings.http_server_port]
        raise CannotRun(f"HTTP_SERVER_PORT is {settings.http_server_port}, used by {taken_by}")
    wanted[settings.http_server_port] = "the service (HTTP_SERVER_PORT sets another)"
    for port, who in wanted.items():
        try:
            _try_port(port)
        except OSError as error:
            raise CannotRun(_no_port(port, who, error)) from None


def _try_port(port: int) -> None:
    """Raise the OSError that listening on `port` would raise."""
    with socket.socket() as probe:  # macOS lets two programs bind one port in different ways
        if probe.connect_ex((HOST, port)) == 0:
            raise OSError(errno.EADDRINUSE, "is taken")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not for TIME_WAIT
        probe.bind((HOST, port))


def _no_port(port: int, who: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port}, for {who}, is taken: stop what is using it"
    return f"port {port}, for {who}, cannot be used: {error.strerror}"


def _start_service(
    stack: ExitStack, environment: dict[str, str], settings: Settings
) -> "subprocess.Popen[bytes]":
    # In a session of its own the terminal's Ctrl-C reaches only us, and the service is asked to
    # stop once. The guard stops it too should we be killed.
    python = [sys.executable, "-m"]
    bind = f"{HOST}:{settings.http_server_port}"
    service = subprocess.Popen(
        [*python, "tools.dev.guard", *python, "gunicorn", "--bind", bind],
        cwd=ROOT,
        env=postgres.serving(environment),
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    stack.callback(_stop_service, service)
    return service


def _stop_service(service: "subprocess.Popen[bytes]") -> None:
    """Let the requests under way finish; a further signal hurries."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: service.send_signal(signal.SIGINT))
    if service.stdin:
        service.stdin.close()
    service.wait()
    with contextlib.suppress(OSError):  # a guard that was killed has left its command behind
        os.killpg(service.pid, signal.SIGTERM)


def _until_ready(
    service: "subprocess.Popen[bytes]", settings: Settings, stopping: threading.Event
) -> bool:
    url = f"http://{HOST}:{settings.http_server_port}/healthz"
    give_up = time.monotonic() + READY_WITHIN
    while service.poll() is None and not stopping.wait(0.1):
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            if requests.get(url, timeout=1, proxies={"no_proxy": "*"}).ok:
                return True
        if time.monotonic() > give_up:
            raise CannotRun(f"the service does not answer within {READY_WITHIN:g} s")
    return False


def _welcome(settings: Settings, where: str) -> str:
    service = f"http://{HOST}:{settings.http_server_port}"
    providers = "\n".join(f"    {mock.name:<10} {mock.url(HOST)}" for mock in PROVIDERS)
    username, _ = settings.migrating_role  # who may change the rows
    database = f"{settings.db_host}:{settings.db_port}/{settings.db_name}"
    return f"""
The notifier is running.

    service    {service}/
{providers}
    PostgreSQL {username}@{database}{where}

Open the providers' pages in a browser, then send a notification to a seller:

    curl -i {service}/api/v1.0/recipient/seller/notify -d '{EXAMPLE}'

Ctrl-C stops everything.
"""


if __name__ == "__main__":
    sys.exit(main())
