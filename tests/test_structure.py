"""Rules that reviews overlook: imports, shipped files and values, and documented settings."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import MISSING, fields
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions, requires
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from notifier.serving import listening, master
from notifier.serving.worker import Worker
from notifier.settings import Settings
from notifier.store.db import DATABASE_WAIT
from notifier.variables import WITHOUT_EFFECT

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "notifier"
TOOLS = ROOT / "tools"
CONFIGURATION = ROOT / "gunicorn.conf.py"

# Import levels: a module imports from strictly lower levels, or from its own folder, where imports
# go one way too. A folder's level is that of all its modules.
LEVELS = {
    "app": 8,
    "web": 7,
    "notifications": 6,
    "cli": 5,
    "delivery": 5,
    "attempts": 4,
    "serving": 3,
    "store": 3,
    "addresses": 2,
    "breakers": 2,
    "capacity": 2,
    "settings": 2,
    "wire": 2,
    "arrival": 1,
    "characters": 1,
    "environ": 1,
    "errors": 1,
    "logs": 1,
    "metrics": 1,
    "models": 1,
    "ranked_queue": 1,
    "single_flight": 1,
    "variables": 1,
    "sharing": 0,
}

# Only these may import Flask or werkzeug.
FLASK = {"app", "web", "cli"}

REQUIRED = {
    "DB_HOST": "127.0.0.1",
    "DB_PORT": "5432",
    "DB_NAME": "notifier",
    "DB_USERNAME": "notifier",
    "DB_PASSWORD": "change-me",
}

# Defaults that depend on the machine or on another variable are described, not quoted. So is None.
DESCRIBED = {"WEB_CONCURRENCY", "NOTIFY_DEADLINE"}


def imported_names(path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(path)}


def module_of(path: Path) -> str:
    """Return the dotted name of a file below `notifier/`, without the package's own: `web.ops`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if name != "__init__"]


def place_of(module: str) -> str:
    """Return the key of a module in LEVELS: its folder, or its own name at the top."""
    return module.partition(".")[0]


def imported_modules(path: Path) -> set[str]:
    """Return which of our modules and folders a file imports."""
    ours = {name.removeprefix("notifier.") for name in imported_names(path)}
    return ours & FILES.keys() - {"__init__"}


def test_every_module_has_a_level() -> None:
    assert {place_of(module) for module in MODULES} == LEVELS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels_or_its_own_folder(module: str) -> None:
    place = place_of(module)
    for imported in imported_modules(FILES[module]):
        target = place_of(imported)
        assert target == place or LEVELS[target] < LEVELS[place], imported


def test_there_are_no_import_cycles() -> None:
    graph = {module: imported_modules(FILES[module]) for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("module", MODULES)
def test_only_the_http_and_command_modules_import_flask(module: str) -> None:
    if place_of(module) not in FLASK:
        assert imported_packages(FILES[module]).isdisjoint({"flask", "werkzeug"})


def test_nothing_in_the_service_imports_the_tools() -> None:
    assert (TOOLS / "dev").is_dir()
    for path in [*FILES.values(), CONFIGURATION]:
        assert "tools" not in imported_packages(path), path


# requests' extension points. Nothing else of these libraries is subclassed.
EXTENDED = {"BaseAdapter", "requests.PreparedRequest"}
LIBRARIES = ("requests", "urllib3", "http", "ssl", "socket", "httptools")


WIRE = [name for name in MODULES if place_of(name) == "wire"]
SERVING = [name for name in MODULES if place_of(name) == "serving"]


def their_names(path: Path) -> set[str]:
    """Return the names under which a file imports the libraries' modules and their parts."""
    names = {name for name in imported_names(path) if name.partition(".")[0] in LIBRARIES}
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("module", WIRE)
def test_the_wire_overrides_nothing_of_a_library(module: str) -> None:
    theirs = their_names(FILES[module])
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        bases = map(ast.unparse, getattr(node, "bases", ()))
        assert {base for base in bases if base.partition(".")[0] in theirs} <= EXTENDED
        targets = map(ast.unparse, getattr(node, "targets", ()))
        assert not {target for target in targets if target.partition(".")[0] in theirs}


@pytest.mark.parametrize("module", WIRE + SERVING)
def test_no_private_name_of_a_library_is_used(module: str) -> None:
    tree = ast.parse(FILES[module].read_text())
    reached = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls")
    }
    imported = {name.rpartition(".")[2] for name in imported_names(FILES[module])}
    assert not {name for name in reached | imported if re.match(r"_[^_]", name)}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_serving_modules_import_gunicorn(module: str) -> None:
    if place_of(module) != "serving":
        assert "gunicorn" not in imported_packages(FILES[module])


@pytest.mark.parametrize(
    "package", [path for path in FILES.values() if path.name == "__init__.py"], ids=module_of
)
def test_the_init_file_of_a_package_imports_nothing(package: Path) -> None:
    assert list(imported_names(package)) == []


def test_gunicorns_configuration_imports_only_settings_and_serving() -> None:
    ours = {name for name in imported_modules(CONFIGURATION) if place_of(name) != "serving"}
    assert ours == {"settings"}


def test_gunicorns_configuration_is_short() -> None:
    assert len(CONFIGURATION.read_text().splitlines()) <= 80


def loaded_after(code: str) -> set[str]:
    """Return the modules that a process has loaded once it has run `code`."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}; import json, sys; print(json.dumps([*sys.modules]))"],
        cwd=ROOT,
        env=REQUIRED,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    return set(json.loads(shown))


@pytest.mark.usefixtures("processes")
def test_gunicorns_configuration_loads_no_library_that_only_workers_need() -> None:
    modules = loaded_after("import runpy; runpy.run_path('gunicorn.conf.py')")
    assert "notifier.settings" in modules
    assert modules.isdisjoint({"flask", "werkzeug", "psycopg", "requests", "prometheus_client"})


@pytest.mark.usefixtures("processes")
def test_a_worker_loads_neither_the_commands_nor_modules_that_only_they_use() -> None:
    modules = loaded_after("from notifier.app import create_app; create_app()")
    store = {"catalogue", "migrations", "role_check", "role_limits", "role_reading", "roles"}
    assert modules.isdisjoint({"yoyo", *(f"notifier.store.{name}" for name in store)})
    assert {name for name in modules if name.startswith("notifier.cli.")} == {
        "notifier.cli.commands",
        "notifier.cli.parts",
    }


def pinned(name: str) -> dict[str, str]:
    """Return the packages and versions of a requirements file, each of which must be pinned."""
    versions: dict[str, str] = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line or line.startswith(("#", "-c ")):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z,]+\])?==([0-9][0-9a-z.+]*)", line)
        assert match, f"{line} is not pinned"
        assert match[1] not in versions
        versions[match[1]] = match[2]
    assert versions
    return versions


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned(path: Path) -> None:
    pinned(path.name)


# A file's packages may need those of the files before it, and no others: pip resolves nothing.
INSTALLED = ["requirements.txt", "requirements-run.txt", "requirements-dev.txt"]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_each_requirement_of_a_requirement_is_pinned_in_the_version_it_wants(
    python: str, system: str
) -> None:
    environment = {"python_version": python, "sys_platform": system}
    pins: dict[str, str] = {}
    for name in INSTALLED:
        pins |= pinned(name)
        for package in pinned(name):
            for wanted in map(Requirement, requires(package) or []):
                if not wanted.marker or wanted.marker.evaluate(environment | {"extra": ""}):
                    version = pins.get(canonicalize_name(wanted.name), "")
                    assert version, f"{name}: {package} needs {wanted}"
                    assert wanted.specifier.contains(version), f"{package} needs {wanted}"


def test_no_requirement_is_pinned_twice() -> None:
    files = (pinned(path.name) for path in ROOT.glob("requirements*.txt"))
    assert max(Counter(chain.from_iterable(files)).values()) == 1


def test_every_package_that_the_service_imports_is_in_its_requirements() -> None:
    files = [*FILES.values(), CONFIGURATION]
    packages = set().union(*(imported_packages(path) for path in files))
    distributions = packages_distributions()
    for package in packages - {"notifier"} - sys.stdlib_module_names:
        names = {name.lower().replace("_", "-") for name in distributions[package]}
        assert names & pinned("requirements.txt").keys(), package


def test_migrations_are_numbered_without_gaps_and_each_can_be_undone() -> None:
    files = {path.name: path.read_text() for path in (ROOT / "migrations").iterdir()}
    steps = sorted(name for name in files if not name.endswith(".rollback.sql"))
    assert steps
    for number, name in enumerate(steps, 1):
        assert re.fullmatch(rf"{number:04}_[a-z0-9_]+\.sql", name)
    undone = [name.replace(".sql", ".rollback.sql") for name in steps]
    assert sorted(files) == sorted(steps + undone)
    assert all(text.strip() for text in files.values())


def gunicorn_conf(monkeypatch: pytest.MonkeyPatch, **environ: str) -> dict[str, Any]:
    for name, value in (REQUIRED | environ).items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(CONFIGURATION))


def test_gunicorn_is_shipped_with_threads_without_preload_and_without_a_control_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conf = gunicorn_conf(monkeypatch, WEB_CONCURRENCY="3", WEB_THREADS="7", HTTP_SERVER_PORT=":81")
    shipped = {
        "wsgi_app": "notifier.app:create_app()",
        "bind": listening.addresses(None, 81),
        "workers": 3,
        "threads": 18,  # 7 notifications, 7 that wait, 4 to spare
        "preload_app": False,
        "control_socket_disable": True,
    }
    assert {name: conf[name] for name in shipped} == shipped
    assert conf["worker_class"] is Worker


@pytest.mark.parametrize("threads", [1, 32, 512])
def test_there_is_room_for_idle_connections_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    conf = gunicorn_conf(monkeypatch, WEB_THREADS=str(threads))
    assert conf["worker_connections"] >= 2 * conf["threads"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 75), ("600s", 600), ("1.5s", 2), ("1ms", 1), ("0s", 0)]
)
def test_idle_connections_are_kept_for_whole_seconds(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: int
) -> None:
    conf = gunicorn_conf(monkeypatch, HTTP_SERVER_KEEPALIVE=text)
    Config().set("keepalive", conf["keepalive"])
    assert conf["keepalive"] == seconds


def test_gunicorn_knows_and_accepts_every_shipped_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config()
    ours = {"settings"}
    plain = (str, int, float, tuple, list, dict, Settings)
    for name, value in gunicorn_conf(monkeypatch).items():
        if isinstance(value, plain) and name.islower() and not name.startswith("_"):
            assert name in config.settings or name in ours, name
        if name in config.settings:
            config.set(name, value)


def test_metrics_are_kept_in_memory_only_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A write to a full memory file system kills the process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=15 * 2**20))
    assert master.make_metrics_folder().parent == tmp_path


def test_each_time_out_is_longer_than_those_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env(REQUIRED)
    graceful_timeout = gunicorn_conf(monkeypatch)["graceful_timeout"]
    ladder = [
        DATABASE_WAIT,
        settings.http_client_timeout,
        settings.notify_deadline,
        graceful_timeout,
    ]
    assert ladder == sorted(set(ladder))


def test_a_longer_deadline_makes_the_graceful_timeout_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gunicorn_conf(monkeypatch, NOTIFY_DEADLINE="90s")["graceful_timeout"] == 105


def test_without_a_folder_for_metrics_the_start_fails_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(**_: Any) -> None:
        raise OSError

    when_ready = gunicorn_conf(monkeypatch)["when_ready"]
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(SystemExit, match=r"^notifier cannot start: .* TMPDIR"):
        when_ready(SimpleNamespace(cfg=Config()))


def variables() -> dict[str, Any]:
    """Return every variable with its default, including the variables for files of secrets."""
    named = {field.name.upper(): field.default for field in fields(Settings)}
    secrets = [field.name.upper() for field in fields(Settings) if field.metadata["secret"]]
    return named | {f"{name}_FILE": None for name in secrets}


def is_described(name: str) -> bool:
    return name in DESCRIBED or variables()[name] is None


def value_of(name: str, text: str) -> Any:
    """Return the setting that results from `text` in variable `name`."""
    return getattr(Settings.from_env(REQUIRED | {name: text}), name.lower(), None)


def shipped_value(name: str) -> Any:
    if name == "WEB_CONCURRENCY":  # depends on the machine: its CPUs, up to 4
        return 4
    return getattr(Settings.from_env(REQUIRED), name.lower(), None)


def documented_settings() -> list[tuple[str, str]]:
    """Return variable and default of every row of docs/settings.md that begins with variables."""
    rows = []
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        first, default = (*line.split("|"), "", "", "")[1:3]
        if re.fullmatch(r"(\s*`[A-Z]+(_[A-Z]+)+`)+\s*", first):
            rows += [(name, default.strip()) for name in re.findall(r"[A-Z_]+", first)]
    return rows


def test_the_settings_page_documents_every_variable_once_and_no_other() -> None:
    documented = [name for name, _ in documented_settings()]
    assert sorted(documented) == sorted([*variables(), *WITHOUT_EFFECT])


def test_the_settings_page_gives_the_defaults() -> None:
    for name, cell in documented_settings():
        if name in WITHOUT_EFFECT:
            assert cell == "none", name
        elif variables()[name] is MISSING:
            assert cell == "required", name
        elif is_described(name):
            assert cell, name
        else:
            assert value_of(name, cell.strip("`")) == shipped_value(name), name
            assert re.fullmatch(r"`[^`]+`", cell), name


def example_settings() -> list[tuple[bool, str, str]]:
    """Return every assignment in .env.example: True if it is active, its name and its value."""
    text = (ROOT / ".env.example").read_text()
    assignments = re.findall(r"^(# )?([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE)
    return [(not comment, name, value) for comment, name, value in assignments]


def test_the_example_names_every_variable_once_and_no_other() -> None:
    named = [name for _, name, _ in example_settings()]
    assert sorted(named) == sorted([*variables(), *WITHOUT_EFFECT])


def test_the_example_sets_required_variables_and_shows_the_other_defaults() -> None:
    for is_set, name, value in example_settings():
        if name in WITHOUT_EFFECT:
            assert not is_set, name
        elif variables()[name] is MISSING:
            assert is_set, name
            assert value, name
        else:
            assert not is_set, name
            assert value_of(name, value) == shipped_value(name), name
            assert value or is_described(name), name


def test_the_example_is_valid_with_and_without_its_commented_assignments() -> None:
    Settings.from_env({name: value for is_set, name, value in example_settings() if is_set})
    Settings.from_env({name: value for _, name, value in example_settings()})
