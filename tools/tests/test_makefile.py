"""The Makefile installs each set of packages once, tried with a fake Python."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service import ROOT, clean_environment

pytestmark = pytest.mark.usefixtures("processes")

# Makes the .venv that it is asked for with itself as Python, and writes down all other calls.
PYTHON = """#!/bin/sh
case "$*" in
-c*) ;;
"-m venv "*" .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip "*" --version") exit "${WITHOUT_PIP:-0}" ;;
"-m ensurepip") [ -z "$WITHOUT_ENSUREPIP" ] && cp "$0" .venv/bin/pip ;;
*" install "*|install\\ *) echo "${0##*/} $*" >>installed.log; exit "${NO_NETWORK:-0}" ;;
*) echo "ran: $*" ;;
esac
"""

BASE = "--no-deps -r requirements.txt -r requirements-run.txt"

Make = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone with what the Makefile needs, and a Python."""
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


@pytest.fixture
def make(checkout: Path) -> Make:
    def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["make", "PYTHON=./python", *arguments],
            cwd=checkout,
            env=clean_environment() | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def installed(checkout: Path) -> list[str]:
    """Return what each call of pip has installed, and forget it."""
    log = checkout / "installed.log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return calls


def change(path: Path) -> None:
    """Let the file be newer than all that was installed."""
    later = time.time() + 10
    os.utime(path, (later, later))


def test_the_first_run_installs_only_what_running_needs_and_says_so(
    checkout: Path, make: Make
) -> None:
    began = int(time.time())
    done = make("run")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "1/4 installing (up to a minute, once)"
    launcher, since = second.rsplit(" ", 1)
    assert launcher == "ran: -m tools.dev.run"
    assert began <= int(since) <= time.time()
    (call,) = installed(checkout)
    assert call.endswith(BASE)


def test_the_next_run_installs_nothing(checkout: Path, make: Make) -> None:
    make("run")
    installed(checkout)
    assert make("run").stdout.startswith("1/4 installed already\nran: -m tools.dev.run ")
    assert installed(checkout) == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-run.txt"])
def test_a_changed_file_is_installed_anew(checkout: Path, make: Make, name: str) -> None:
    make("install")
    (checkout / ".venv/left").touch()
    installed(checkout)
    change(checkout / name)
    assert make("run").stdout.startswith("1/4 installing")
    assert len(installed(checkout)) == 1
    assert not (checkout / ".venv/left").exists()


def test_tests_and_linters_come_on_top_and_run_does_without_them(
    checkout: Path, make: Make
) -> None:
    make("install")
    (checkout / ".venv/left").touch()
    installed(checkout)
    make(".venv/dev-installed")
    (call,) = installed(checkout)
    assert call.endswith("--no-deps -r requirements-dev.txt")
    assert (checkout / ".venv/left").exists()
    change(checkout / "requirements-dev.txt")
    assert make("run").stdout.startswith("1/4 installed already")


@pytest.mark.parametrize("target", ["lint", "check", "test"])
def test_checks_need_the_tests_requirements(checkout: Path, make: Make, target: str) -> None:
    make(target)  # fails: ruff is not there
    assert len(installed(checkout)) == 2


def test_the_pip_of_python_installs_into_the_environment(checkout: Path, make: Make) -> None:
    make("install")
    (call,) = installed(checkout)
    assert call.startswith("python -m pip --python .venv/bin/python install ")


def test_without_that_pip_the_environment_gets_one(checkout: Path, make: Make) -> None:
    make(".venv/dev-installed", WITHOUT_PIP="1")
    base, dev = installed(checkout)
    assert base.startswith("pip install ")
    assert base.endswith(BASE)
    assert dev.startswith("pip install ")


def test_a_python_that_can_make_no_environment_is_one_line_and_leaves_no_stamp(make: Make) -> None:
    for _ in range(2):
        done = make("run", WITHOUT_PIP="1", WITHOUT_ENSUREPIP="1")
        assert done.returncode == 2
        assert done.stderr.startswith("make: ./python cannot make .venv, see above; on Debian")


def test_a_failed_installation_is_tried_again(checkout: Path, make: Make) -> None:
    assert make("run", NO_NETWORK="1").returncode == 2
    installed(checkout)
    assert make("run").returncode == 0
    assert len(installed(checkout)) == 1


def test_a_machine_without_python_is_told_so(make: Make) -> None:
    done = make("run", "PYTHON=")
    assert done.returncode == 2
    expected = "make: no Python 3.11 or newer found; set PYTHON=/path/to/python3\n"
    assert done.stderr.startswith(expected)


def test_help_lists_every_command(make: Make) -> None:
    listed = [line.split()[1] for line in make().stdout.splitlines()]
    assert listed == [
        *["help", "install", "run", "check", "test", "lint"],
        *["measure", "chaos", "pressure", "bench", "up", "down"],
    ]
