"""The hooks of conftest.py, which mark, order, group and deselect tests and report it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import system_postgres
from tests.service import ROOT
from tools.dev import programs

TESTS = """
import pytest

def test_plain(): pass

@pytest.mark.needs("sh")
def test_shell(): pass

@pytest.mark.needs("no-such-tool")
@pytest.mark.parametrize("number", [1, 2])
def test_tool(number): pass

@pytest.mark.needs("containers")
def test_containers(): pass
"""


@pytest.fixture
def run(processes: None, tmp_path: Path):
    """Run pytest on `tests` with arguments and variables; return its exit code and output."""

    def run(*arguments: str, tests: str = TESTS, **variables: str) -> tuple[int, str]:
        (tmp_path / "test_sample.py").write_text(tests)
        ours = dict.fromkeys(("TEST_CONTAINERS", "REQUIRE_ALL", "PYTEST_ADDOPTS"), "")
        pytest_ = [sys.executable, "-m", "pytest", "-p", "conftest", "-v"]
        done = subprocess.run(
            [*pytest_, "--rootdir", tmp_path, "-c", ROOT / "setup.cfg", *arguments, tmp_path],
            cwd=ROOT,
            env=os.environ | ours | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout

    return run


WITHOUT_XDIST_AND_WITH = pytest.mark.parametrize(
    "several", [(), ("-n", "1", "--dist", "loadgroup")], ids=["without xdist", "with xdist"]
)


@WITHOUT_XDIST_AND_WITH
def test_a_test_whose_program_is_missing_is_deselected_and_the_summary_says_why(run, several):
    code, output = run(*several)
    assert code == 0
    assert "2 passed" in output
    assert "PASSED" in output
    assert "FAILED" not in output
    assert "deselected 2 tests: no-such-tool is not installed\n" in output
    assert "deselected 1 test: TEST_CONTAINERS is not 1\n" in output


def test_the_summary_is_silent_if_no_test_is_deselected(run):
    code, output = run("-k", "plain or shell", REQUIRE_ALL="1")
    assert code == 0
    assert "2 passed" in output
    assert "is not" not in output


def test_container_tests_run_if_the_environment_enables_them(run):
    code, output = run("-k", "containers", TEST_CONTAINERS="1")
    assert code == 0
    assert "test_containers PASSED" in output


@WITHOUT_XDIST_AND_WITH
def test_with_require_all_a_missing_executable_fails_the_run(run, several):
    code, output = run(*several, REQUIRE_ALL="1")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "REQUIRE_ALL is 1, but no-such-tool is not installed" in output
    assert "2 passed" in output
    assert "2 errors" in output


def test_with_require_all_container_tests_still_have_to_be_enabled(run):
    code, output = run("-k", "containers or plain", REQUIRE_ALL="1")
    assert code == 0
    assert "deselected 1 test: TEST_CONTAINERS is not 1\n" in output


SERVERS_AND_OTHERS = """
import subprocess, pytest

def test_plain(): pass

@pytest.fixture
def database(server): pass

@pytest.mark.usefixtures("database")
def test_database(): pass

@pytest.mark.usefixtures("processes")
def test_program(): subprocess.run(["true"], check=True)

def test_program_without_the_fixture(): subprocess.run(["true"], check=True)
"""


def test_the_mark_servers_follows_from_a_tests_fixtures(run):
    code, output = run("-m", "not servers", tests=SERVERS_AND_OTHERS)
    assert "test_plain PASSED" in output
    assert "1 failed, 1 passed, 2 deselected" in output
    assert "true: use the fixture `processes`" in output
    assert code == pytest.ExitCode.TESTS_FAILED


ALONE = """
import os, time, pytest

running = os.environ["RUNNING"]

def run(name):
    open(os.path.join(running, name), "w").close()
    time.sleep(2 if name == "3" else 0)
    os.unlink(os.path.join(running, name))

@pytest.mark.alone
def test_alone():
    assert os.listdir(running) == []
    run("alone")

@pytest.mark.parametrize("number", range(4))
def test_with_others(number):
    assert "alone" not in os.listdir(running)
    run(str(number))
"""


@pytest.mark.parametrize(
    "several", [(), ("-n", "2", "--dist", "loadgroup")], ids=["without xdist", "with xdist"]
)
def test_a_test_marked_alone_runs_last_and_beside_no_other(run, tmp_path, several):
    running = tmp_path / "running"
    running.mkdir()
    code, output = run(*several, tests=ALONE, RUNNING=str(running))
    assert (code, "5 passed" in output) == (0, True), output
    *_, last = (line for line in output.splitlines() if "PASSED" in line)
    assert several or "test_alone" in last


SHARED = """
import os, pytest

@pytest.fixture(scope="module")
def started(processes):
    with open(os.environ["STARTED"], "a") as file:
        print(os.environ["PYTEST_XDIST_WORKER"], file=file)

@pytest.mark.parametrize("number", range(4))
def test_of_the_module(started, number): pass
"""


def test_tests_that_share_a_module_fixture_run_in_one_worker(run, tmp_path):
    arguments, started = ("-n", "2", "--dist", "loadgroup"), tmp_path / "started"
    code, output = run(*arguments, tests=SHARED, STARTED=str(started))
    assert (code, "4 passed" in output) == (0, True), output
    assert len(started.read_text().splitlines()) == 1


def test_a_lone_surrogate_in_a_report_does_not_crash_a_run_under_xdist(run):
    surrogate = 'def test_odd():\n    print("\\udcff")\n    assert "\\udcff" == ""\n'
    code, output = run("-n", "1", tests=surrogate)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert r"AssertionError: assert '\udcff' == ''" in output


def test_the_newest_system_postgresql_that_has_a_server_is_chosen(tmp_path, monkeypatch):
    """Debian installs each version in its own folder, which may hold only client programs."""
    monkeypatch.setattr(programs, "SYSTEM", (f"{str(tmp_path)[1:]}/*/bin",))
    assert system_postgres.binaries() is None
    for version, program in (("9", "postgres"), ("15", "postgres"), ("16", "psql")):
        folder = tmp_path / version / "bin"
        folder.mkdir(parents=True)
        (folder / program).touch()
    assert system_postgres.binaries() == tmp_path / "15" / "bin"
