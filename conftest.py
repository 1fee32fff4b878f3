"""How the tests run: which need servers, which stay together, which run alone, which are left out.

What a test needs is read from the fixtures that it uses, directly or through others. Whichever use
`server` or `processes` have the mark `servers`, and `make check` runs all others. Of these the ones
that share a module's fixture run in one process of xdist's, so that it is set up once.

A test marked `alone` is sensitive to load: no other runs beside it, and it comes last.

A test marked `needs(what)` is left out where `what` is missing, and the summary says so. `what` is
an executable, "postgresql" for the system's own, or "containers": those tests run with
TEST_CONTAINERS=1. With REQUIRE_ALL=1 a test fails where anything else is missing.
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

from tests import chromium, pgbouncer, system_postgres

pytest_plugins = ["tests.fixtures"]

# What is looked for elsewhere than on the path.
_INSTALLED: dict[str, Callable[[str], object]] = {
    "postgresql": lambda _: system_postgres.binaries(),
    "pgbouncer": lambda _: pgbouncer.executable(),
    "chromium": lambda _: chromium.executable(),
}

_LEFT_OUT = pytest.StashKey[Counter[str]]()  # how many tests, by reason


# Whichever of these fixtures a test uses, it starts programs.
_SERVERS = {"server", "processes"}

# Programs that a test may start all the same: they end by themselves, and at once.
_QUICK = {"openssl"}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Mark, order and leave out tests."""
    for item in items:
        if _SERVERS & {*item.fixturenames}:
            item.add_marker("servers")
            if _shares_a_fixture(item):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=_is_alone)
    yield  # -k and -m choose, so that what they leave out needs nothing
    if getattr(config.option, "loadgroup", False):
        _name_groups(items)
        # Groups first, for they take longest; nobody is left to wait beside those that are alone.
        items.sort(key=lambda item: (_is_alone(item), _group(item) is None))
    reasons = {item: reason for item in items if (reason := _missing(item))}
    config.stash[_LEFT_OUT] = Counter(reasons.values())
    if reasons:
        config.hook.pytest_deselected(items=[*reasons])
        items[:] = [item for item in items if item not in reasons]


def _name_groups(items: list[pytest.Item]) -> None:
    """Name groups in the ids: xdist 3.8.0 tries to, by an attribute that pytest 9.2 lacks."""
    for item in items:
        if group := _group(item):
            item._id = item.id.parse(f"{item.nodeid.removesuffix(f'@{group}')}@{group}")


def _group(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else None


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Return whether the test uses a fixture that others of its module use with it."""
    known = item._fixtureinfo.name2fixturedefs.values()
    return any(definition.scope == "module" for name in known for definition in name)


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Hold a lock beside the other processes of xdist's, for a test `alone` against them."""
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
    """Fail a test that starts programs without a fixture that says so."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("servers"):
            patch.setattr(subprocess, "Popen", _QuickOnly)
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a process of xdist's tell what it left out to the one that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = {**session.config.stash.get(_LEFT_OUT, Counter())}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a process of xdist's left out: each leaves out the same."""
    left_out = Counter(getattr(node, "workeroutput", {}).get("left out", {}))
    node.config.stash[_LEFT_OUT] = left_out


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and why."""
    for reason, count in config.stash.get(_LEFT_OUT, Counter()).items():
        terminalreporter.line(f"deselected {count} test{'s'[: count > 1]}: {reason}")


def _missing(item: pytest.Item) -> str | None:
    """Return why the test is left out here; None if it is not."""
    needed = {mark.args[0] for mark in item.iter_markers("needs")}
    if "containers" in needed and os.environ.get("TEST_CONTAINERS") != "1":
        return "TEST_CONTAINERS is not 1"
    absent = _not_installed(item)
    return f"{absent} is not installed" if absent and not _is_all_required() else None


def _not_installed(item: pytest.Item) -> str | None:
    """Return what the test needs, and this machine lacks."""
    needed = [mark.args[0] for mark in item.iter_markers("needs")]
    programs = (what for what in needed if what != "containers")
    return next((what for what in programs if not _INSTALLED.get(what, shutil.which)(what)), None)


def _is_all_required() -> bool:
    return os.environ.get("REQUIRE_ALL") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that is not left out although something is missing."""
    if absent := _not_installed(item):
        pytest.fail(f"REQUIRE_ALL is 1, but {absent} is not installed", pytrace=False)


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
