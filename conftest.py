"""How the tests run: which are left out, and why.

A test marked `needs(what)` is left out where `what` is missing, and the summary says so. `what` is
an executable, "postgresql" for the system's own, or "containers": those tests run with
TEST_CONTAINERS=1. REQUIRE_ALL=1 makes anything else that is missing an error.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest

from tests import pgbouncer, system_postgres

pytest_plugins = ["tests.fixtures"]

# What is looked for elsewhere than on the path.
_INSTALLED: dict[str, Callable[[str], object]] = {
    "postgresql": lambda _: system_postgres.binaries(),
    "pgbouncer": lambda _: pgbouncer.executable(),
}

_LEFT_OUT = pytest.StashKey[Counter[str]]()  # how many tests, by reason


@pytest.hookimpl(trylast=True)  # so that what -k and -m leave out needs nothing
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need what this machine does not have."""
    reasons = {item: reason for item in items if (reason := _missing(item))}
    config.stash[_LEFT_OUT] = Counter(reasons.values())
    if reasons:
        config.hook.pytest_deselected(items=[*reasons])
        items[:] = [item for item in items if item not in reasons]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and why."""
    for reason, count in config.stash.get(_LEFT_OUT, Counter()).items():
        terminalreporter.line(f"deselected {count} test{'s'[: count > 1]}: {reason}")


def _missing(item: pytest.Item) -> str | None:
    """Return why the test cannot run here; None if it can."""
    for what in (mark.args[0] for mark in item.iter_markers("needs")):
        if what == "containers":
            if os.environ.get("TEST_CONTAINERS") != "1":
                return "TEST_CONTAINERS is not 1"
        elif not _INSTALLED.get(what, shutil.which)(what):
            if os.environ.get("REQUIRE_ALL") == "1":
                raise pytest.UsageError(f"REQUIRE_ALL is 1, but {what} is not installed")
            return f"{what} is not installed"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Replace lone surrogates, which xdist cannot send, in all that a report quotes."""
    return _sendable((yield))


def _sendable(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode(errors="backslashreplace").decode()
    if isinstance(data, dict):
        return {name: _sendable(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_sendable(value) for value in data]
    return data
