"""The marker `needs`: what is missing is said, never skipped in silence."""

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
    """Run `TESTS` with variables and arguments; return exit code and output."""
    (tmp_path / "test_sample.py").write_text(TESTS)

    def run(*arguments: str, **variables: str) -> tuple[int, str]:
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


def test_what_is_missing_is_left_out_and_the_summary_says_why(run):
    code, output = run()
    assert code == 0
    assert "2 passed, 3 deselected" in output
    assert "test_shell PASSED" in output
    assert "deselected 2 tests: no-such-tool is not installed\n" in output
    assert "deselected 1 test: TEST_CONTAINERS is not 1\n" in output


def test_nothing_is_said_where_nothing_is_left_out(run):
    code, output = run("-k", "plain or shell", REQUIRE_ALL="1")
    assert code == 0
    assert "2 passed" in output
    assert "is not" not in output


def test_containers_are_tested_where_the_environment_says_that_they_can_be(run):
    code, output = run("-k", "containers", TEST_CONTAINERS="1")
    assert code == 0
    assert "test_containers PASSED" in output


def test_where_all_is_required_a_missing_executable_fails_the_run(run):
    code, output = run(REQUIRE_ALL="1")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "REQUIRE_ALL is 1, but no-such-tool is not installed" in output
    assert "passed" not in output


def test_where_all_is_required_containers_still_need_to_be_asked_for(run):
    code, output = run("-k", "containers or plain", REQUIRE_ALL="1")
    assert code == 0
    assert "deselected 1 test: TEST_CONTAINERS is not 1\n" in output


def test_of_the_systems_postgresqls_the_newest_that_can_serve_is_taken(tmp_path, monkeypatch):
    """Debian has each in a folder off the path, and the clients' programs in such folders too."""
    monkeypatch.setattr(programs, "SYSTEM", (f"{str(tmp_path)[1:]}/*/bin",))
    assert system_postgres.binaries() is None
    for version, program in (("9", "postgres"), ("15", "postgres"), ("16", "psql")):
        folder = tmp_path / version / "bin"
        folder.mkdir(parents=True)
        (folder / program).touch()
    assert system_postgres.binaries() == tmp_path / "15" / "bin"
