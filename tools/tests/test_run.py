"""`make run`: up with one command, gone with one signal, whichever and however often."""

import contextlib
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.fixtures import connect
from tests.service import MESSAGE, ROOT, clean_environment, free_port

pytestmark = pytest.mark.usefixtures("processes")

# The launcher as make runs it, with ports that are free here instead of the documented ones.
LAUNCHER = """
import sys
from tools.dev import run
ports = map(int, sys.argv[1:])
run.PROVIDERS = tuple(local._replace(port=next(ports)) for local in run.PROVIDERS)
sys.exit(run.main())
"""


class Launcher:
    """A running launcher, with ports of its own and its data in `folder`."""

    def __init__(self, folder: Path, *, stdin: int = subprocess.DEVNULL, **variables: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.providers = [free_port() for _ in range(4)]
        ours = {"HTTP_SERVER_PORT": str(self.port), "EMBEDDED_PG_DIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *map(str, self.providers)],
            cwd=ROOT,
            env=clean_environment() | ours | variables,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def welcome(self) -> str:
        """Return what was printed up to the welcome's last line."""
        assert self.process.stdout is not None
        seen: list[str] = []
        for line in self.process.stdout:
            seen.append(line)
            if line.startswith("Ctrl-C"):
                return "".join(seen)
        raise AssertionError("".join(seen))

    def family(self) -> list[psutil.Process]:
        """Everything that runs because of the launcher, itself and PostgreSQL included."""
        mine = [psutil.Process(self.process.pid)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.folder) in word for word in process.cmdline()):
                    mine.append(process)
        with_children = [[process, *process.children(recursive=True)] for process in mine]
        return list({process for group in with_children for process in group})

    def url(self, provider: int) -> str:
        return f"http://127.0.0.1:{self.providers[provider]}"

    def end(self, *numbers: int) -> None:
        """Send signals one right after the other, and wait until all of the family is gone."""
        family = self.family()
        assert len(family) > 8  # launcher, guard, gunicorn, two workers, watcher, PostgreSQL
        for number in numbers:
            self.process.send_signal(number)
        self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []


@pytest.fixture
def launch() -> Iterator[Callable[..., Launcher]]:
    """Start launchers that share their data; what a failed test leaves is killed."""
    launched: list[Launcher] = []
    with tempfile.TemporaryDirectory(prefix="notifier-run-") as folder:
        Path(folder).chmod(0o711)  # run by root, PostgreSQL has another account

        def start(**options: Any) -> Launcher:
            launched.append(Launcher(Path(folder, "data"), **options))
            return launched[-1]

        yield start
        for launcher in launched:
            launcher.process.kill()
            launcher.process.communicate()


def send(launcher: Launcher) -> int:
    url = f"http://127.0.0.1:{launcher.port}/api/v1.0/recipient/seller/notify"
    return requests.post(url, json=MESSAGE, timeout=30).status_code


def messages(launcher: Launcher, provider: int) -> list[dict[str, str]]:
    reply = requests.get(f"{launcher.url(provider)}/messages", timeout=10)
    return list(reply.json()["messages"])


def test_everything_runs_after_one_command_and_is_found_again_by_the_next(launch):
    launcher = launch()
    welcome = launcher.welcome()
    curl = next(line.strip() for line in welcome.splitlines() if line.strip().startswith("curl"))
    _, _, url, _, data = shlex.split(curl)
    answer = requests.post(url, data=data, timeout=30)
    assert answer.status_code == 200
    assert answer.json() == {"message": "notification sent successfully"}
    assert [len(messages(launcher, n)) for n in range(4)] == [1, 0, 1, 0]
    for port in (launcher.port, *launcher.providers):
        assert f":{port}/" in welcome

    requests.put(f"{launcher.url(0)}/behaviour", json={"behaviour": "503"}, timeout=10)
    assert send(launcher) == 200
    assert [len(messages(launcher, n)) for n in range(4)] == [2, 1, 2, 0]
    launcher.end(signal.SIGINT)

    (launcher.folder / "service-password").unlink()  # a version with one role had none
    again = launch()
    again.welcome()
    # It can read its providers; they have other ports now.
    assert requests.get(f"http://127.0.0.1:{again.port}/readyz", timeout=30).status_code == 200
    assert _rows(again) == ["email 1", "email 2", "push 1", "push 2"]
    again.end(signal.SIGTERM)


def test_the_service_has_the_role_that_reads_and_the_welcome_names_the_one_that_writes(launch):
    launcher = launch()
    welcome = launcher.welcome()
    folder, port = launcher.folder, (launcher.folder / "port").read_text()
    shown = f"PostgreSQL notifier@127.0.0.1:{port}/notifier (password in {folder / 'password'})"
    assert shown in welcome
    service = psutil.Process(launcher.process.pid).children(recursive=True)
    assert len(service) > 3  # guard, gunicorn, two workers
    for process in service:
        known = process.environ()
        assert known["DB_USERNAME"] == "notifier_service"
        assert known["DB_PASSWORD"] == (folder / "service-password").read_text()
        assert [name for name in known if name.startswith("DB_MIGRATION")] == []
        assert (folder / "password").read_text() not in known.values()
    launcher.end(signal.SIGTERM)


def test_an_own_database_with_one_user_is_used_by_that_user(launch, empty_database):
    both = {
        "DB_USERNAME": empty_database["DB_MIGRATION_USERNAME"],
        "DB_PASSWORD": empty_database["DB_MIGRATION_PASSWORD"],
    }
    owners = {"DB_MIGRATION_USERNAME": "", "DB_MIGRATION_PASSWORD": ""}
    launcher = launch(**empty_database | both | owners)
    where = "{DB_USERNAME}@{DB_HOST}:{DB_PORT}/{DB_NAME}\n".format(**empty_database | both)
    assert f"PostgreSQL {where}" in launcher.welcome()
    assert send(launcher) == 200
    launcher.process.send_signal(signal.SIGTERM)
    launcher.process.communicate(timeout=60)
    assert launcher.process.returncode == 0
    assert not launcher.folder.exists()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP,),
        (signal.SIGKILL,),
    ],
    ids=lambda numbers: "+".join(number.name for number in numbers),
)
def test_no_process_is_left_whatever_ends_it(launch, numbers: tuple[signal.Signals, ...]):
    launcher = launch()
    launcher.welcome()
    launcher.end(*numbers)


def test_a_guard_that_is_killed_takes_the_service_along(launch):
    launcher = launch()
    launcher.welcome()
    family = launcher.family()
    (guard,) = psutil.Process(launcher.process.pid).children()
    guard.kill()
    output, _ = launcher.process.communicate(timeout=60)
    assert launcher.process.returncode == 1
    assert "the service has ended by itself" in output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_a_terminal_that_is_closed_ends_everything(launch):
    """As of an ssh session: its make gets the SIGHUP and keeps it to itself."""
    terminal, stdin = pty.openpty()
    launcher = launch(stdin=stdin)
    os.close(stdin)
    launcher.welcome()
    family = launcher.family()
    os.close(terminal)
    launcher.process.communicate(timeout=60)
    assert launcher.process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_a_proxy_in_the_environment_is_not_asked_for_what_runs_here(launch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # accepts, and never answers
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        launcher = launch(HTTP_PROXY=address, http_proxy=address, WEB_CONCURRENCY="")
        launcher.welcome()
        assert send(launcher) == 200
        launcher.end(signal.SIGTERM)


def test_a_taken_port_is_named_in_one_line(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = subprocess.run(
            [sys.executable, "-c", LAUNCHER, *map(str, (free_port(), port, free_port(), 1))],
            cwd=ROOT,
            env=clean_environment() | {"HTTP_SERVER_PORT": str(free_port())},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert refused.returncode == 1
    expected = f'make run: port {port}, for the mock provider "email 2", is taken'
    assert refused.stderr.startswith(expected)
    assert refused.stderr.count("\n") == 1


def _rows(launcher: Launcher) -> list[str]:
    port = (launcher.folder / "port").read_text()
    password = (launcher.folder / "password").read_text()
    database = {
        "DB_HOST": "127.0.0.1",
        "DB_PORT": port,
        "DB_NAME": "notifier",
        "DB_USERNAME": "notifier",
        "DB_PASSWORD": password,
    }
    with connect(database) as connection:
        query = "SELECT provider_name FROM notification_preferences ORDER BY id"
        return [row[0] for row in connection.execute(query)]


def test_the_guard_ends_with_its_command_and_its_exit_code():
    command = [sys.executable, "-m", "tools.dev.guard", sys.executable, "-c", "exit(7)"]
    guard = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
    with guard:
        assert guard.wait(20) == 7  # with its input still open


def test_the_guard_ends_its_command_with_its_input():
    sleeper = "import time; print('up', flush=True); time.sleep(60)"
    command = [sys.executable, "-m", "tools.dev.guard", sys.executable, "-c", sleeper]
    guard = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with guard:
        assert guard.stdout
        assert guard.stdin
        assert guard.stdout.readline() == b"up\n"
        guard.stdin.close()
        assert guard.wait(20) == 128 + signal.SIGTERM
