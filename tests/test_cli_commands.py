"""All commands: `--help` works in any environment, and one line reports a missing setting."""

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result
from flask.cli import FlaskGroup

from notifier.app import create_app
from tests.fixtures import MakeSettings
from tests.service import ROOT

COMMANDS = [
    "migrate",
    "rollback",
    "check-role",
    "providers list",
    "providers add --channel email --name n --host http://a/",
    "providers edit 1 --priority 1",
    "providers remove 1",
    "providers restore 1",
    "providers test 1",
]


def flask(*arguments: str) -> Result:
    """Run `flask --app notifier.app` in this process, whose environment has no settings."""
    return CliRunner().invoke(FlaskGroup(load_dotenv=False), ["--app", "notifier.app", *arguments])


@pytest.fixture(autouse=True)
def _without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_RUN_FROM_CLI", "")  # flask sets it; this unsets it afterwards


def name_of(command: str) -> str:
    """Return a command line without its arguments."""
    return command.partition(" --")[0].removesuffix(" 1")


def names(group: click.Command, *before: str) -> Iterator[str]:
    """Yield the names of a group's commands, including those of nested groups."""
    assert isinstance(group, click.Group)
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield " ".join([*before, name])
        if isinstance(command, click.Group):
            yield from names(command, *before, name)


def test_all_commands_are_tested_here(make_settings: MakeSettings) -> None:
    ours = {*names(create_app(make_settings()).cli)}
    assert {"providers", *map(name_of, COMMANDS)} == ours


def test_a_proxy_that_cannot_be_used_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DB_HOST", "DB_NAME", "DB_USERNAME", "DB_PASSWORD"):
        monkeypatch.setenv(name, "nothing")
    monkeypatch.setenv("DB_PORT", "1")
    monkeypatch.setenv("ALL_PROXY", "socks5://user:s3cr3t@proxy")
    result = flask("migrate")
    assert result.exit_code == 1
    assert "ALL_PROXY cannot be used (its scheme" in result.output
    assert "s3cr3t" not in result.output


@pytest.mark.parametrize("loud", [False, True])
def test_the_help_lists_the_commands_in_any_environment(
    loud: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loud:
        monkeypatch.setenv("LOG_LEVEL", "loud")
    result = flask("--help")
    assert (result.exit_code, result.stderr) == (0, "")
    for command in ("migrate", "rollback", "check-role", "providers", "run", "routes"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", ["providers", *COMMANDS])
def test_every_command_has_help_in_any_environment(command: str) -> None:
    name = name_of(command)
    result = flask(*name.split(), "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f" {name} " in result.stdout.splitlines()[0]


@pytest.mark.parametrize("command", [*COMMANDS, "routes"])
def test_every_command_reports_a_missing_setting_in_one_line(command: str) -> None:
    result = flask(*command.split())
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith("notifier cannot start: DB_HOST is missing: ")


def test_a_command_warns_of_variables_that_are_perhaps_misspelt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DB_SLMODE", "CIRCUT_BREAKER_WINDOW"):
        monkeypatch.setenv(name, "s3cr3t-value")
    result = flask("providers", "list")
    assert result.stderr == (
        "warning: unknown variables have no effect: "
        "CIRCUT_BREAKER_WINDOW (did you mean CIRCUIT_BREAKER_WINDOW?), "
        "DB_SLMODE (did you mean DB_SSLMODE?)\n"
    )
    assert "s3cr3t-value" not in result.output


def test_an_invalid_command_line_is_reported_before_missing_settings() -> None:
    for wrong in (["unknown"], ["providers", "unknown"], ["providers", "remove"]):
        assert flask(*wrong).exit_code == 2


def test_without_settings_the_service_itself_cannot_start() -> None:
    with pytest.raises(SystemExit, match=r"^notifier cannot start: DB_HOST is missing: "):
        create_app()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("command", "code"), [("--help", 0), ("migrate", 1)])
def test_commands_behave_the_same_in_a_process_with_an_empty_environment(
    command: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "notifier.app", command],
        cwd=ROOT,
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    if code:
        (line,) = done.stderr.splitlines()
        assert line.startswith("notifier cannot start: DB_HOST is missing: ")
    else:
        assert "\n  check-role " in done.stdout
