"""`make run`: one command starts everything, and one signal of any kind stops it."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.fixtures import connect
from tests.service import MESSAGE, ROOT, clean_environment, free_port
from tests.timing import eventually
from tools.dev import cluster, run

pytestmark = pytest.mark.usefixtures("processes")

COMMAND = [sys.executable, "-m", "tools.dev.run"]


def first_of_four_free_ports() -> int:
    while True:
        first = free_port()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first + 1, first + 4):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


class Launcher:
    """A running launcher, with ports of its own and its data in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        **variables: str,
    ) -> None:
        self.folder = folder
        self.port = free_port()
        first = first_of_four_free_ports()
        self.providers = range(first, first + 4)
        ours = {
            "HTTP_SERVER_PORT": str(self.port),
            "SANDBOX_PORT": str(first),
            "EMBEDDED_PG_DIR": str(folder),
        }
        self.process = subprocess.Popen(
            [*COMMAND, str(time.time())],
            cwd=ROOT,
            env=clean_environment() | ours | variables,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def welcome(self) -> str:
        """Return what was printed up to the welcome's last line."""
        assert self.process.stdout is not None
        seen: list[str] = []
        for line in self.process.stdout:
            seen.append(line)
            if "Ctrl-C stops everything" in line:
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

    def end(self, *numbers: int) -> str:
        """Send signals one right after the other, wait for the whole family's end; return the rest.

        The rest is what the launcher printed meanwhile.
        """
        family = self.family()
        assert len(family) > 8  # launcher, guard, gunicorn, two workers, watcher, PostgreSQL
        for number in numbers:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        return rest


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
    answer = requests.post(**example(welcome), timeout=30)
    assert answer.status_code == 200
    assert answer.json() == {"message": "notification sent successfully"}
    assert [len(messages(launcher, n)) for n in range(4)] == [1, 0, 1, 0]
    for port in launcher.providers:
        assert f" :{port}" in welcome

    requests.put(f"{launcher.url(0)}/behaviour", json={"behaviour": "503"}, timeout=10)
    assert send(launcher) == 200
    assert [len(messages(launcher, n)) for n in range(4)] == [2, 1, 2, 0]
    launcher.end(signal.SIGINT)

    (launcher.folder / "service-password").unlink()  # a version with one role had none
    again = launch()
    welcome = again.welcome()
    assert rows(again) == [
        (name, f"{again.url(n)}/")
        for n, name in enumerate(("email 1", "email 2", "push 1", "push 2"))
    ]
    assert f"    the provider push 2 moved to port {again.providers[3]}\n" in welcome
    assert [len(messages(again, n)) for n in range(4)] == [0, 0, 0, 0]
    assert send(again) == 200
    again.end(signal.SIGTERM)


def example(welcome: str) -> dict[str, str]:
    """Return the address and the data of the curl command that the welcome shows."""
    _, _, rest = welcome.partition("    curl ")
    _, url, _, data = shlex.split(rest.partition("\n\n")[0].replace("\\\n", ""))
    assert "://" not in url  # a browser's GET of it is a 405
    return {"url": f"http://{url}", "data": data}


def test_it_says_what_it_does_and_for_how_long_the_user_has_waited(launch):
    began = time.time()
    launcher = launch()
    said = launcher.welcome().splitlines()
    waited = time.time() - began
    assert said[0] == "2/4 starting PostgreSQL"
    steps = [line for line in said if line[1:3] == "/4"]
    assert [step[0] for step in steps] == ["2", "3", "4"]
    (ready,) = [re.fullmatch(r"ready in ([0-9]+) s", line) for line in said if "ready in" in line]
    assert 0 <= int(ready[1]) <= waited + 1
    rest = launcher.end(signal.SIGINT).splitlines()
    assert rest[-1] == run.FAREWELL
    assert "stopping; press Ctrl-C again to abort the requests in progress" in rest


def test_the_wait_is_counted_from_the_users_command():
    refused = subprocess.run(
        [sys.executable, "-c", COUNTED, str(time.time() - 100)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert 100 <= float(refused.stdout) < 130


COUNTED = """
import time
from tools.dev import run
run.run = lambda stack, output, stopping, began: output.say(str(time.monotonic() - began))
run.FAREWELL = ""
run.main()
"""


def test_every_address_that_it_prints_answers(launch):
    launcher = launch()
    said = launcher.welcome()
    addresses = set(re.findall(r"https?://[^\s\"')]+", said))
    assert {f"{launcher.url(0)}/", f"http://127.0.0.1:{launcher.port}/"} <= addresses
    for address in addresses:
        reply = requests.get(address, timeout=10, allow_redirects=False)
        assert reply.status_code < 400, address
    launcher.end(signal.SIGTERM)


def test_in_a_pipe_the_services_lines_are_its_own_json_to_the_last(launch):
    launcher = launch()
    said = launcher.welcome()
    assert send(launcher) == 200
    lines = (said + launcher.end(signal.SIGTERM)).splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    assert [entry["recipient"] for entry in entries if entry["message"] == "request"] == ["seller"]
    assert entries[-1]["message"] == "Shutting down: Master"
    assert lines[-1] == run.FAREWELL
    assert "\033" not in "".join(lines)


def test_on_a_terminal_the_log_is_readable_to_the_last_line(launch):
    ours, theirs = pty.openpty()
    launcher = launch(stdout=theirs, TERM="xterm")
    os.close(theirs)
    seen = read_until(ours, "Ctrl-C stops everything")
    requests.put(f"{launcher.url(0)}/behaviour", json={"behaviour": "503"}, timeout=10)
    assert send(launcher) == 200
    seen += read_until(ours, "push 1: accepted")
    launcher.process.send_signal(signal.SIGINT)
    seen += read_until(ours, run.FAREWELL)
    assert launcher.process.wait(60) == 0
    os.close(ours)
    lines = seen.splitlines()
    assert not [line for line in lines if line.startswith("{")]
    (request,) = [line for line in lines if "push 1: accepted" in line]
    assert re.search(r" 200 seller [0-9.]+ ms  email 1: 503 → email 2: accepted; push 1", request)
    assert "\033[32mINFO   \033[0m" in request
    assert "Shutting down: Master" in lines[-2]


def read_until(terminal: int, text: str) -> str:
    seen = b""
    while text.encode() not in seen:
        seen += os.read(terminal, 65536)
    return seen.decode()


def test_a_terminal_that_is_paused_holds_up_neither_a_request_nor_the_stop(launch):
    ours, theirs = pty.openpty()
    launcher = launch(stdout=theirs, LOG_LEVEL="DEBUG")
    os.close(theirs)
    read_until(ours, "Ctrl-C stops everything")
    for _ in range(300):  # their lines are more than a terminal and a pipe hold
        assert send(launcher) == 200
    assert len(messages(launcher, 0)) == 200  # the most that it keeps
    family = launcher.family()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(60) == 0
    os.close(ours)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_the_sandbox_hears_the_log(launch):
    launcher = launch()
    launcher.welcome()
    assert send(launcher) == 200

    def is_logged() -> bool:
        state = requests.get(f"{launcher.url(0)}/sandbox/state", timeout=10).json()
        return bool(state["notifications"][0]["is_logged"])

    eventually(is_logged)
    launcher.end(signal.SIGTERM)


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
    welcome = launcher.welcome()
    assert "2/4 using the PostgreSQL of DB_HOST\n" in welcome
    assert f"PostgreSQL {where}" in welcome
    assert send(launcher) == 200
    launcher.process.send_signal(signal.SIGTERM)
    launcher.process.communicate(timeout=60)
    assert launcher.process.returncode == 0
    assert not launcher.folder.exists()


def test_a_second_one_leaves_the_first_ones_database_alone(launch):
    first = launch()
    first.welcome()
    second = launch(EMBEDDED_PG_DIR=str(first.folder))
    output, _ = second.process.communicate(timeout=60)
    assert second.process.returncode == 1
    assert f"another make run uses the database in {first.folder}: stop it, or set" in output
    assert send(first) == 200
    first.end(signal.SIGTERM)


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
    assert "the service ended unexpectedly" in output
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_a_terminal_that_is_closed_ends_everything(launch):
    """A closing ssh session: its make gets the SIGHUP and does not forward it."""
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


def refusal(**variables: str) -> str:
    """Return the line with which a launcher refuses to start."""
    refused = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.count("\n") == 1
    return refused.stderr.strip()


def test_a_taken_port_is_named_in_one_line():
    first = first_of_four_free_ports()
    with socket.create_server(("127.0.0.1", first + 1)):
        line = refusal(SANDBOX_PORT=str(first), HTTP_SERVER_PORT=str(free_port()))
    assert line == (
        f'make run: port {first + 1}, for the mock provider "email 2", is taken, perhaps by another'
        " make run: stop that, or set SANDBOX_PORT to the first of 4 other ports"
    )


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"SANDBOX_PORT": "65533"}, 'make run: SANDBOX_PORT is "65533": expected a whole number'),
        ({"HTTP_SERVER_PORT": "9092"}, "make run: HTTP_SERVER_PORT is 9092, the port of "),
        ({"HTTP_SERVER_PORT": "many"}, 'make run: HTTP_SERVER_PORT is "many": expected a port'),
    ],
)
def test_a_wrong_port_is_named_before_anything_starts(variables, line):
    assert refusal(**variables).startswith(line)


def rows(launcher: Launcher) -> list[tuple[str, str]]:
    """Return name and URL of each provider in the launcher's database."""
    with connect(cluster.environment(launcher.folder)) as connection:
        query = "SELECT provider_name, host FROM notification_preferences ORDER BY id"
        return connection.execute(query).fetchall()


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
