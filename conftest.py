"""How pytest runs the tests: marks, order, grouping and deselection.

A test that uses the fixture `server` or `processes`, directly or through another fixture, gets the
mark `servers`. `make check` runs only the tests without it. Tests with the mark that share a
module-scoped fixture run in the same xdist worker, so that the fixture is set up once.

A test marked `alone` is sensitive to load: it runs last, with no other test beside it.

A test marked `needs(name)` is deselected if `name` is missing, and the summary says so. `name` is
an executable, "postgresql" for the system's own PostgreSQL, "tmpfs" for a memory file system of a
test's own, or "containers". Container tests run with TEST_CONTAINERS=1. With REQUIRE_ALL=1 a test
fails if a program is missing; whether a tmpfs may be mounted depends on the machine.
"""

import fcntl
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import chromium, pgbouncer, system_postgres, tmpfs

pytest_plugins = ["tests.fixtures"]

# Finders for programs that may be installed outside PATH.
_INSTALLED: dict[str, Callable[[str], object]] = {
    "postgresql": lambda _: system_postgres.binaries(),
    "pgbouncer": lambda _: pgbouncer.executable(),
    "chromium": lambda _: chromium.executable(),
}

_DESELECTED = pytest.StashKey[Counter[str]]()  # number of tests by reason


# A test that uses one of these fixtures starts programs.
_SERVERS = {"server", "processes"}

# Programs that any test may start: they end by themselves, and at once.
_QUICK = {"openssl"}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Mark, order and deselect tests."""
    for item in items:
        if _SERVERS & {*item.fixturenames}:
            item.add_marker("servers")
            if _shares_a_fixture(item):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=_is_alone)
    yield  # -k and -m deselect here, so that those tests need nothing installed
    if getattr(config.option, "loadgroup", False):
        _name_groups(items)
        # Groups first, because they take longest. Tests marked `alone` still come last.
        items.sort(key=lambda item: (_is_alone(item), _group(item) is None))
    reasons = {item: reason for item in items if (reason := _missing(item))}
    config.stash[_DESELECTED] = Counter(reasons.values())
    if reasons:
        config.hook.pytest_deselected(items=[*reasons])
        items[:] = [item for item in items if item not in reasons]


def _name_groups(items: list[pytest.Item]) -> None:
    """Append the group to each test's id.

    xdist 3.8.0 would do so itself, but through an attribute that pytest 9.2 no longer has.
    """
    for item in items:
        if group := _group(item):
            item._id = item.id.parse(f"{item.nodeid.removesuffix(f'@{group}')}@{group}")


def _group(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else None


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Return True if the test uses a module-scoped fixture."""
    known = item._fixtureinfo.name2fixturedefs.values()
    return any(definition.scope == "module" for name in known for definition in name)


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Hold a lock that keeps a test marked `alone` apart from the tests of other xdist workers."""
    with _in_turn(item), _programs_forbidden(item):
        return (yield)


@contextmanager
def _in_turn(item: pytest.Item) -> Iterator[None]:
    if not hasattr(item.config, "workerinput"):
        yield
        return
    folder = os.open(Path(item.config.option.basetemp).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX if _is_alone(item) else fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


class _QuickOnly(subprocess.Popen[Any]):
    def __init__(self, command: Any, *args: Any, **options: Any) -> None:
        assert command[0] in _QUICK, f"{command[0]}: use the fixture `processes`"
        super().__init__(command, *args, **options)


@contextmanager
def _programs_forbidden(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts a program but uses neither `server` nor `processes`."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("servers"):
            patch.setattr(subprocess, "Popen", _QuickOnly)
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send an xdist worker's deselection counts to the process that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        counts = session.config.stash.get(_DESELECTED, Counter())
        session.config.workeroutput["deselected"] = {**counts}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep one xdist worker's deselection counts: every worker deselects the same tests."""
    counts = Counter(getattr(node, "workeroutput", {}).get("deselected", {}))
    node.config.stash[_DESELECTED] = counts


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print how many tests were deselected, and why."""
    for reason, count in config.stash.get(_DESELECTED, Counter()).items():
        terminalreporter.line(f"deselected {count} test{'s'[: count > 1]}: {reason}")


def _missing(item: pytest.Item) -> str | None:
    """Return why the test must be deselected on this machine, or None."""
    needed = {mark.args[0] for mark in item.iter_markers("needs")}
    if "containers" in needed and os.environ.get("TEST_CONTAINERS") != "1":
        return "TEST_CONTAINERS is not 1"
    if "tmpfs" in needed and not tmpfs.is_allowed():
        return "no tmpfs may be mounted"
    absent = _not_installed(item)
    return f"{absent} is not installed" if absent and not _is_all_required() else None


def _not_installed(item: pytest.Item) -> str | None:
    """Return the first program that the test needs and this machine lacks."""
    needed = [mark.args[0] for mark in item.iter_markers("needs")]
    programs = (name for name in needed if name not in ("containers", "tmpfs"))
    return next((name for name in programs if not _INSTALLED.get(name, shutil.which)(name)), None)


def _is_all_required() -> bool:
    return os.environ.get("REQUIRE_ALL") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Under REQUIRE_ALL=1, fail a test whose program is not installed."""
    if absent := _not_installed(item):
        pytest.fail(f"REQUIRE_ALL is 1, but {absent} is not installed", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Escape lone surrogates in a report, because xdist cannot send them."""
    return _sendable((yield))


def _sendable(data: Any) -> Any:
    if isinstance(data, str):
        return data.encode(errors="backslashreplace").decode()
    if isinstance(data, dict):
        return {name: _sendable(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_sendable(value) for value in data]
    return data
