"""`./notify`: the service's commands, as a developer types them."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from notifier.settings import Settings
from notifier.store import migrations
from tests.fixtures import Environment
from tests.service import ROOT, clean_environment
from tests.timing import eventually
from tools.dev import postgres
from tools.dev.mock_provider import MockProvider
from tools.tests.server_directory import directory, processes

pytestmark = pytest.mark.usefixtures("processes")

NOTIFY = ROOT / "notify"
ACME = ("--channel", "email", "--name", "Acme Mail", "--host", "https://mail.acme.example/v1")


def notify(
    environment: Environment,
    *arguments: str,
    command: Path = NOTIFY,
    cwd: Path = ROOT,
    given: str = "",
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [command, *arguments],
        cwd=cwd,
        env=clean_environment() | environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_the_command_as_it_was_typed_and_needs_no_database(tmp_path: Path) -> None:
    nowhere = {"EMBEDDED_PG_DIR": str(tmp_path / "none")}
    shown = notify(nowhere, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: ./notify [OPTIONS] COMMAND")
    commands = {line.split()[0] for line in shown.stdout.partition("Commands:\n")[2].splitlines()}
    assert commands == {"check-role", "migrate", "providers", "rollback"}
    help_of_add = notify(nowhere, "providers", "add", "--help").stdout
    assert "    ./notify providers add --channel email --name 'Acme Mail'" in help_of_add
    assert "flask" not in help_of_add
    assert notify(nowhere).stderr == shown.stdout
    assert not (tmp_path / "none").exists()


def test_a_database_of_ones_own_is_used_when_db_host_is_set(database: Environment) -> None:
    added = notify(database, "providers", "add", *ACME, "--secret-stdin", given="s3cr3t\n")
    assert (added.returncode, added.stderr) == (0, "")
    assert "Acme Mail" in notify(database, "providers", "list").stdout


def test_exit_codes_and_errors_pass_through(database: Environment) -> None:
    refused = notify(database, "providers", "remove", "7")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: ")
    misspelt = notify(database, "provider", "list")
    assert misspelt.returncode == 2
    assert "Usage: ./notify" in misspelt.stderr


def test_errors_name_the_command_as_it_was_typed(empty_database: Environment) -> None:
    refused = notify(empty_database, "providers", "list")
    expected = "Error: there is no table notification_preferences: run ./notify migrate\n"
    assert (refused.returncode, refused.stderr) == (1, expected)


def test_it_works_in_any_folder_and_through_a_link(database: Environment, tmp_path: Path) -> None:
    """A file is looked for where the user is, a module never is."""
    (tmp_path / "notifier").mkdir()
    (tmp_path / "notifier" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "acme.key").write_text("s3cr3t\n")
    link = tmp_path / "n"
    link.symlink_to(NOTIFY)
    add = ("providers", "add", *ACME, "--secret-file", "acme.key")
    added = notify(database, *add, command=link, cwd=tmp_path)
    assert (added.returncode, added.stderr) == (0, "")


def test_a_prompt_has_the_terminal(database: Environment) -> None:
    ours, theirs = pty.openpty()
    adding = subprocess.Popen(
        [NOTIFY, "providers", "add", *ACME, "--secret-prompt"],
        cwd=ROOT,
        env=clean_environment() | database,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    with adding:
        for prompt in (b"Secret", b"Repeat"):
            seen = b""
            while prompt not in seen:
                seen += os.read(ours, 1000)
            os.write(ours, b"s3cr3t\n")
        output, _ = adding.communicate(timeout=60)
    os.close(ours)
    assert adding.returncode == 0
    assert b"Acme Mail" in output


def test_without_db_host_the_database_of_make_run_is_used_and_stopped_again() -> None:
    with directory() as base:
        own = {"EMBEDDED_PG_DIR": str(base)}
        migrated = notify(own | {"DB_HSOT": "prod", "DB_NAME": "other", "DB_PORT": ""}, "migrate")
        ignored = "DB_HOST is not set: ignoring DB_HSOT, DB_NAME, using make run's database"
        assert (migrated.returncode, migrated.stderr) == (0, f"notify: {ignored}\n")
        assert notify(own, "providers", "list").stderr == "no providers\n"
        eventually(lambda: not processes(base))
        with postgres.server(base) as environment:
            assert migrations.migrate(Settings.from_env(environment)).applied == []
            assert notify(own, "check-role").returncode == 0  # beside another user of the server


def test_a_proxy_in_the_environment_is_not_asked_for_a_local_provider(
    database: Environment,
) -> None:
    with MockProvider("email 1", 0) as provider:
        add = ("providers", "add", *ACME[:-1], provider.url)
        proxied = database | {"http_proxy": "http://127.0.0.1:1", "no_proxy": "elsewhere"}
        assert notify(proxied, *add).returncode == 0
        tested = notify(proxied, "providers", "test", "1")
    assert (tested.returncode, provider.total) == (0, 1)


def test_a_server_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    refused = notify({"EMBEDDED_PG_DIR": str(tmp_path)}, "migrate")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"notify: {tmp_path} holds other files")
    assert refused.stderr.count("\n") == 1


def test_where_nothing_is_installed_it_says_how_to_begin(tmp_path: Path) -> None:
    shutil.copy(NOTIFY, tmp_path)
    refused = notify({}, "--help", command=tmp_path / "notify", cwd=tmp_path)
    assert refused.returncode == 1
    expected = f"notify: nothing is installed yet: run make install in {tmp_path}\n"
    assert refused.stderr == expected
