"""The commands `flask --app notifier.app providers`: input, output, exit codes and secrets."""

import json
import os
import pty
import re
import select
import shlex
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result

from notifier import logs
from notifier.app import create_app
from notifier.cli.providers import providers
from notifier.settings import Settings
from tests.fixtures import Environment, MakeProvider, connect, one_role
from tests.scripted_provider import Peer, Received, Script, answer, hang, reset
from tests.service import ROOT, clean_environment
from tests.sockets import LOOPBACK, refusing
from tests.timing import eventually, within

URL = "https://mail.example.com/v1/send"
SECRET = "s3cr3t-k\u00e9y"
ADD = ("add", "--channel", "email", "--name", "Acme Mail", "--host", URL)
TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ")

AddProvider = Callable[..., int]


def run(environment: Environment, *command: str, given: str | bytes | None = None) -> Result:
    """Run `providers` with `command` in this process, `given` on its standard input."""
    app = create_app(Settings.from_env(environment))
    return app.test_cli_runner().invoke(args=["providers", *command], input=given)


def done(environment: Environment, *command: str, given: str | bytes | None = None) -> str:
    """Run a command that must succeed and return its output."""
    result = run(environment, *command, given=given)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert SECRET not in result.output
    return result.stdout


def failed(
    environment: Environment, *command: str, given: str | bytes | None = None, code: int = 1
) -> str:
    """Run a command that must fail and return the last line of its standard error."""
    result = run(environment, *command, given=given)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (code, "")
    assert SECRET not in result.stderr
    *before, last = result.stderr.splitlines()
    assert bool(before) == (code == 2)  # click prints the usage first
    return last


def process(environment: Environment, *command: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "notifier.app", "providers", *command],
        cwd=ROOT,
        env=clean_environment() | environment,
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        | options,
    )


def secrets(environment: Environment) -> list[str | None]:
    with connect(environment) as connection:
        rows = connection.execute("SELECT secret_key FROM notification_preferences ORDER BY id")
        return [secret for (secret,) in rows]


def names_of(output: str) -> list[str]:
    return [entry["name"] for entry in json.loads(output)]


def cells(output: str) -> list[list[str]]:
    """Return a table's cells with every time replaced by `(time)`."""
    lines = TIME.sub("(time)", output).splitlines()
    return [re.split(r" {2,}", line) for line in lines]


COLUMNS = ["id", "channel", "name", "host", "priority", "secret", "created", "state"]
ROW = ["1", "Email", "Acme Mail", URL, "0", "set", "(time)", "active"]


def test_every_command_shows_the_row_after_its_change(database: Environment) -> None:
    added = done(database, *ADD, "--secret-stdin", given=f"{SECRET}\n")
    assert cells(added) == [COLUMNS, ROW]
    assert done(database, "list") == added
    edited = done(database, "edit", "1", "--priority", "-1", "--no-secret", "--name", "Acme")
    assert cells(edited)[1] == [*ROW[:2], "Acme", URL, "-1", "not set", "(time)", "active"]
    removed = done(database, "remove", "1")
    assert cells(removed)[1][-1] == "removed (time)"
    assert done(database, "list") == removed
    assert done(database, "restore", "1") == edited == done(database, "list")


def test_an_option_that_is_zero_or_empty_counts_as_given(database: Environment) -> None:
    done(database, *ADD, "--priority", "5")
    assert cells(done(database, "edit", "1", "--priority", "0"))[1][4] == "0"
    for option in ("--name", "--host"):
        assert "cannot be used" in failed(database, "edit", "1", option, "")


def test_every_command_prints_json_for_scripts(database: Environment) -> None:
    added = json.loads(done(database, *ADD, "--secret-stdin", "--json", given=SECRET))
    assert TIME.fullmatch(added["created_at"])
    assert added == {
        "id": 1,
        "channel": "Email",
        "name": "Acme Mail",
        "host": URL,
        "priority": 0,
        "has_secret": True,
        "created_at": added["created_at"],
        "deleted_at": None,
        "state": "active",
        "problem": None,
    }
    assert json.loads(done(database, "list", "--json")) == [added]
    edited = json.loads(done(database, "edit", "1", "--host", "http://a/", "--json"))
    assert edited == added | {"host": "http://a/"}
    removed = json.loads(done(database, "remove", "1", "--json"))
    assert TIME.fullmatch(removed["deleted_at"])
    assert removed == edited | {"state": "removed", "deleted_at": removed["deleted_at"]}
    assert json.loads(done(database, "restore", "1", "--json")) == edited


def test_the_columns_are_aligned(database: Environment, add_provider: AddProvider) -> None:
    add_provider("http://a/", name="short")
    add_provider("https://a-long-name.example.com/v1/send", "PushNotification", name="n" * 100)
    header, *rows = done(database, "list").splitlines()
    assert len(rows) == 2
    for column in COLUMNS[1:]:
        start = header.index(column)
        assert all(row[start - 2 : start] == "  " and row[start] != " " for row in rows), column


def test_an_empty_list_succeeds_and_prints_no_table(database: Environment) -> None:
    result = run(database, "list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no providers\n")
    assert done(database, "list", "--json") == "[]\n"


def test_the_list_can_be_filtered(database: Environment, add_provider: AddProvider) -> None:
    for number, channel in enumerate(("Email", "Email", "PushNotification")):
        add_provider(f"http://a/{number}", channel, name=f"{channel} {number}")
    done(database, "remove", "1")
    assert names_of(done(database, "list", "--json")) == [
        "Email 1",
        "Email 0",
        "PushNotification 2",
    ]
    assert names_of(done(database, "list", "--json", "--active")) == [
        "Email 1",
        "PushNotification 2",
    ]
    assert names_of(done(database, "list", "--json", "--active", "--channel", "email")) == [
        "Email 1"
    ]


@pytest.mark.parametrize(
    ("given", "channel"),
    [
        *[(given, "Email") for given in ("Email", "email", "EMAIL")],
        *[
            (given, "PushNotification")
            for given in ("PushNotification", "pushnotification", "Push")
        ],
    ],
)
def test_a_channel_may_be_abbreviated_and_written_in_any_case(
    given: str, channel: str, database: Environment
) -> None:
    added = done(database, "add", "--channel", given, "--name", "n", "--host", URL, "--json")
    assert json.loads(added)["channel"] == channel
    assert len(json.loads(done(database, "list", "--channel", given, "--json"))) == 1


def test_control_characters_in_a_row_do_not_reach_the_terminal(
    database: Environment, add_provider: AddProvider
) -> None:
    odd = "\x1b]0;owned\x07\x9b2J\n\u202e\\ \u00fc"
    add_provider(f"http://{odd}", name=odd)
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET priority = NULL, created_at = NULL")
    table = done(database, "list")
    shown = r"\x1b]0;owned\x07\x9b2J\n\u202e\ " + "\u00fc"
    assert cells(table)[1] == [*("1", "Email", shown, f"http://{shown}", "-", "set", "-", "active")]
    as_json = done(database, "list", "--json")
    assert as_json.replace("\n", "").isprintable()
    assert as_json.isascii()
    assert json.loads(as_json)[0]["name"] == odd


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (f"{SECRET}\n", SECRET),
        (f"{SECRET}\r\n", SECRET),
        (SECRET, SECRET),
        (f"{SECRET}\n\n", f"{SECRET}\n"),
        (f"{SECRET}\r", f"{SECRET}\r"),
        (f" {SECRET} \n", f" {SECRET} "),
    ],
)
@pytest.mark.parametrize("source", ["--secret-stdin", "--secret-file"])
def test_a_secret_is_read_without_its_last_line_end(
    source: str, given: str, stored: str, database: Environment, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(given.encode())
    option = [source] if source == "--secret-stdin" else [source, str(tmp_path / "key")]
    done(database, *ADD, *option, given=given.encode())
    done(database, "add", "--channel", "push", "--name", "no secret", "--host", URL)
    assert secrets(database) == [stored, None]
    done(database, "edit", "2", *option, given=given.encode())
    done(database, "edit", "1", "--no-secret")
    assert secrets(database) == [None, stored]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", "the secret is empty"),
        (b"\n", "the secret is empty"),
        (b" \r\n", "the secret is empty"),
        (b"s3cr3t-k\xff", "the secret is not UTF-8 text"),
        (b"s3cr3t-k\x00", "the secret cannot be used: expected up to 16384 characters of text"),
        (b"s3cr3t" * 20000, "the secret cannot be used: expected up to 16384 characters of text"),
    ],
)
@pytest.mark.parametrize("source", ["--secret-stdin", "--secret-file"])
def test_an_invalid_secret_is_refused_and_not_shown(
    source: str, given: bytes, expected: str, database: Environment, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(given)
    option = [source] if source == "--secret-stdin" else [source, str(tmp_path / "key")]
    message = failed(database, *ADD, *option, given=given)
    assert message == f"Error: {expected}"
    assert secrets(database) == []


def test_an_endless_input_is_read_only_a_little_beyond_the_longest_secret(
    database: Environment,
) -> None:
    piped = 0
    with process(database, *ADD, "--secret-stdin") as running:
        assert running.stdin
        with suppress(BrokenPipeError):
            while piped < 2**24:
                piped += os.write(running.stdin.fileno(), b"s3cr3t" * 1000)
        _, errors = running.communicate(timeout=60)
    assert b"up to 16384 characters" in errors
    assert piped < 2**20


def test_an_unreadable_secret_file_is_reported_without_its_name(
    database: Environment, tmp_path: Path
) -> None:
    """The name may be the secret itself, given by mistake."""
    is_none, is_folder = "No such file or directory", "Is a directory"
    for file, why in ((SECRET, is_none), (str(tmp_path), is_folder), ("", is_folder)):
        message = failed(database, *ADD, "--secret-file", file)
        assert message == f"Error: --secret-file cannot be read: {why}"


SOURCES = ["--secret-prompt", "--secret-stdin", "--secret-file /dev/null", "--no-secret"]


@pytest.mark.parametrize("first", SOURCES)
@pytest.mark.parametrize("second", SOURCES)
def test_the_sources_of_a_secret_exclude_each_other(
    first: str, second: str, database: Environment
) -> None:
    if first != second:
        message = failed(database, "edit", "1", *f"{first} {second}".split(), given=SECRET, code=2)
        assert message.endswith("cannot be combined")
        for option in (first, second):
            assert option.split()[0] in message


def test_no_command_takes_a_secret_as_an_argument(database: Environment) -> None:
    options = {
        name: option
        for command in providers.commands.values()
        for option in command.params
        if "secret" in (name := str(option.name))
    }
    assert options.keys() == {"secret_prompt", "secret_stdin", "secret_file", "no_secret"}
    valued = [name for name, option in options.items() if not getattr(option, "is_flag", False)]
    assert valued == ["secret_file"]
    for wrong in (["--secret", SECRET], [f"--secret={SECRET}"], [f"--secret-stdin={SECRET}"]):
        result = run(database, *ADD, *wrong)
        assert (result.exit_code, secrets(database)) == (2, [])
        assert SECRET not in result.output


def test_a_prompt_needs_a_terminal(database: Environment) -> None:
    message = failed(database, *ADD, "--secret-prompt", given=f"{SECRET}\n" * 2, code=2)
    assert message == "Error: --secret-prompt needs a terminal: use --secret-stdin"


PROMPTS = ("Secret: ", "Repeat for confirmation: ")


def typed(environment: Environment, texts: Sequence[str], *command: str) -> tuple[int, str]:
    """Run a command at a terminal, and send it each text at the next of its prompts.

    Return the exit code and all that the terminal has shown. What the command has not read must be
    gone: the operator's shell would take it for commands.
    """
    terminal, end = pty.openpty()
    running = process(
        environment, *command, stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    shown = b""
    with running, os.fdopen(terminal, "wb") as keyboard:
        try:
            for prompt, text in zip(PROMPTS, texts, strict=False):
                shown += read_until(terminal, prompt.encode())
                keyboard.write(text.encode())
                keyboard.flush()
            code = running.wait(30)
            assert not select.select([end], [], [], 0.1)[0], os.read(end, 100)
            os.close(end)
            return code, (shown + read_until(terminal, None)).decode()
        finally:
            running.kill()


def read_until(terminal: int, last: bytes | None) -> bytes:
    """Read up to the text `last`, or until every process has closed the terminal."""
    shown = b""
    give_up = time.monotonic() + 30
    with suppress(OSError):  # every process has closed it
        while last is None or not shown.endswith(last):
            ready, _, _ = select.select([terminal], [], [], give_up - time.monotonic())
            assert ready, shown
            if not (data := os.read(terminal, 4096)):
                break
            shown += data
    return shown


@pytest.mark.parametrize("secret", [SECRET, "s3cr3t" * 500], ids=["short", "long"])
def test_a_secret_is_typed_twice_and_never_shown(secret: str, database: Environment) -> None:
    code, shown = typed(database, [f"{secret}\n", f"{secret}\n"], *ADD, "--secret-prompt")
    assert code == 0, shown
    assert secrets(database) == [secret]
    assert cells(shown)[-1] == ROW
    assert "s3cr3t" not in shown


DIFFER = (
    "Error: the two entries differ, or more than two lines came: nothing is stored. For a secret of"
    " several lines use --secret-file or --secret-stdin"
)
UNUSABLE = (
    "Error: the secret is too long for a terminal, or holds control characters: nothing is stored."
    " Instead use --secret-file or --secret-stdin"
)

# The input at the first prompt and, if any, at the second; and the error.
REFUSED = {
    "mistyped": (["s3cr3t\n", "s3cr3t, mistyped\n"], DIFFER),
    "three lines": (["s3cr3t 1\ns3cr3t 2\ns3cr3t 3\n"], DIFFER),
    "lines that agree later": (["s3cr3t 1\ns3cr3t 2\ns3cr3t 2\ns3cr3t 2\n"], DIFFER),
    "a blank second line": (["s3cr3t 1\n\ns3cr3t 3\n"], DIFFER),
    "a blank first line": (["\ns3cr3t 2\ns3cr3t 2\n"], DIFFER),
    "lines in pieces": (["s3cr3t 1\n", "s3cr3t 2\ns3cr3t 3"], DIFFER),
    "no last line end, twice": (["s3cr3t 1\ns3cr3t 2", "s3cr3t 1\ns3cr3t 2\n"], DIFFER),
    "lines that agree at first": (["s3cr3t\ns3cr3t\ns3cr3t 3\n"], DIFFER),
    "the same without a line end": (["s3cr3t\ns3cr3t\ns3cr3t 3"], DIFFER),
    "lines in brackets": (["\x1b[200~s3cr3t 1\ns3cr3t 2\x1b[201~\n"], DIFFER),
    "brackets": (["\x1b[200~s3cr3t\x1b[201~\n"] * 2, UNUSABLE),
    "a tab": (["s3cr3t\t\n"] * 2, UNUSABLE),
    "cut by the terminal": (["s3cr3t" * 1000 + "\n"] * 2, UNUSABLE),
    "empty": (["\n"] * 2, "Error: the secret is empty"),
    "end of file": (["\x04"], "Aborted!"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_secret_that_a_prompt_cannot_take_whole_is_refused(
    name: str, database: Environment
) -> None:
    texts, error = REFUSED[name]
    code, shown = typed(database, texts, *ADD, "--secret-prompt")
    assert (code, secrets(database)) == (1, [])
    assert shown.splitlines()[-1] == error
    assert "s3cr3t" not in shown


def test_secret_stdin_is_refused_at_a_terminal_which_would_show_the_secret(
    database: Environment,
) -> None:
    code, shown = typed(database, [], *ADD, "--secret-stdin")
    assert (code, secrets(database)) == (2, [])
    assert "standard input is a terminal: use --secret-prompt" in shown


@pytest.mark.parametrize("url", [URL, "nonsense"])
def test_a_process_never_exposes_the_secret_whether_it_succeeds_or_fails(
    url: str, database: Environment
) -> None:
    arguments = ("add", "--channel", "email", "--name", "n", "--host", url, "--secret-stdin")
    with process(database, *arguments) as running:
        eventually(lambda: "flask" in " ".join(psutil.Process(running.pid).cmdline()))
        seen = psutil.Process(running.pid)
        assert SECRET not in f"{seen.cmdline()} {seen.environ()}"
        output, errors = running.communicate(f"{SECRET}\n".encode(), timeout=60)
    assert running.returncode == (0 if url == URL else 1)
    assert (errors == b"") == (url == URL)
    assert "s3cr3t" not in (output + errors).decode()
    assert secrets(database) == ([SECRET] if url == URL else [])


def test_an_error_of_postgresql_does_not_show_the_row(database: Environment) -> None:
    """The details of PostgreSQL's error would show it."""
    with connect(database) as connection:
        connection.execute(
            "ALTER TABLE notification_preferences ADD CONSTRAINT few CHECK (priority < 5)"
        )
    message = failed(database, *ADD, "--priority", "7", "--secret-stdin", given=SECRET)
    assert message.startswith("Error: PostgreSQL: new row for relation")
    assert message.endswith('violates check constraint "few"')


@pytest.mark.parametrize(
    "command",
    [
        ("add",),
        ("add", "--name", "n", "--host", URL),
        ("add", "--channel", "sms", "--name", "n", "--host", URL),
        ("add", "--channel", "email", "--name", "n", "--host", URL, "--priority", "high"),
        ("edit",),
        ("edit", "one", "--priority", "1"),
        ("remove",),
        ("restore", "1", "2"),
        ("test", "1", "--secret-stdin"),
        ("list", "--channel", "both"),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_an_invalid_command_line_exits_with_2(
    command: tuple[str, ...], database: Environment
) -> None:
    failed(database, *command, code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (ADD, "provider 1 is active and has the same channel and URL"),
        (("edit", "1"), "nothing to change: give at least one value"),
        (("edit", "2", "--priority", "1"), "there is no provider 2"),
        (("remove", "2"), "there is no provider 2"),
        (("restore", "1"), "provider 1 is not removed"),
        (("test", "2"), "there is no provider 2"),
    ],
)
def test_a_refused_command_exits_with_1_and_gives_the_reason_in_one_line(
    command: tuple[str, ...], message: str, database: Environment
) -> None:
    done(database, *ADD)
    assert failed(database, *command) == f"Error: {message}"


def test_the_exit_codes_are_those_of_the_process(database: Environment) -> None:
    for command, code in ((("list",), 0), (("remove", "1"), 1), (("remove",), 2)):
        with process(database, *command) as running:
            _, errors = running.communicate(timeout=60)
        assert running.returncode == code, errors
        assert b"Traceback" not in errors


@pytest.fixture
def reader(database: Environment) -> Environment:
    """The `DB_*` variables of a role that may only read the table."""
    name = f"reader_of_{database['DB_NAME']}"
    with connect(database) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'readers-p4ssword'")
        connection.execute(f"GRANT SELECT ON notification_preferences TO {name}")
    return one_role(database, name, "readers-p4ssword")


def test_a_read_only_role_can_list_and_test_but_changes_are_refused(
    database: Environment, reader: Environment, make_provider: MakeProvider
) -> None:
    provider = make_provider()
    done(database, "add", "--channel", "email", "--name", "n", "--host", provider.url)
    assert done(reader, "list") == done(database, "list")
    assert "accepted" in done(reader, "test", "1")
    advice = (
        "on notification_preferences: set DB_MIGRATION_USERNAME and DB_MIGRATION_PASSWORD"
        " to the role that owns it"
    )
    lacks = f"Error: {reader['DB_USERNAME']} lacks"
    assert failed(reader, *ADD) == f"{lacks} INSERT and UPDATE {advice}"
    for command in (("edit", "1", "--priority", "1"), ("remove", "1"), ("restore", "1")):
        assert failed(reader, *command) == f"{lacks} UPDATE {advice}"


def test_changes_are_made_as_the_role_that_migrates(
    database: Environment, reader: Environment
) -> None:
    done(database | {name: reader[name] for name in ("DB_USERNAME", "DB_PASSWORD")}, *ADD)
    assert cells(done(reader, "list"))[1][0] == "1"


def test_without_the_table_a_command_says_to_migrate(empty_database: Environment) -> None:
    assert failed(empty_database, "list") == (
        "Error: there is no table notification_preferences: run flask --app notifier.app migrate"
    )


def test_an_unreachable_postgresql_is_reported_in_one_line(server: Environment) -> None:
    with refusing() as port:
        message = failed(server | {"DB_HOST": LOOPBACK, "DB_PORT": str(port)}, "list")
    assert message.startswith("Error: PostgreSQL: ")
    assert "Connection refused" in message


def test_a_wrong_password_is_reported_in_one_line_and_not_shown(database: Environment) -> None:
    message = failed(one_role(database, password="not-the-p4ssword"), "list")
    assert message.startswith("Error: PostgreSQL: ")
    assert "not-the-p4ssword" not in message


@pytest.mark.parametrize("command", sorted(providers.commands))
def test_the_help_of_every_command_ends_with_examples_that_parse(
    command: str, make_settings: Callable[..., Settings]
) -> None:
    runner = create_app(make_settings()).test_cli_runner()
    result = runner.invoke(args=["providers", command, "--help"])
    assert result.exit_code == 0
    _, _, examples = result.stdout.partition("Example")
    joined = examples.replace("\\\n", " ")
    typed = re.findall(r"flask --app notifier.app providers (\S+) ?([^|<\n]*)", joined)
    assert typed
    for name, arguments in typed:
        assert name == command
        words = shlex.split(arguments)
        providers.commands[name].make_context(name, words)  # parses the arguments


def test_the_help_names_the_role_variables_and_explains_the_exit_codes(
    make_settings: Callable[..., Settings],
) -> None:
    help_text = create_app(make_settings()).test_cli_runner().invoke(args=["providers", "--help"])
    for expected in (
        "DB_MIGRATION_USERNAME",
        "DB_USERNAME",
        "0 done",
        "1 refused",
        "2 the command",
    ):
        assert expected in help_text.stdout


def outcome(environment: Environment, *command: str) -> dict[str, Any]:
    """Return the result of `test --json` after checking its exit code."""
    result = run(environment, "test", "1", *command, "--json")
    assert result.stderr == ""
    assert SECRET not in result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if found["outcome"] == "accepted" else 1)
    return found


def judged(found: dict[str, Any]) -> tuple[str, int | None, str | None]:
    return found["outcome"], found["status"], found["error"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, "accepted"),
        (202, "accepted"),
        (302, "rejected"),
        (400, "rejected"),
        (429, "not_sent"),
        (503, "unknown"),
    ],
)
def test_a_test_reports_the_outcome_that_the_providers_status_means(
    status: int,
    expected: str,
    database: Environment,
    add_provider: AddProvider,
    make_provider: MakeProvider,
) -> None:
    provider = make_provider(answer(status, b"{}", "Location: http://127.0.0.1:1/"))
    add_provider(provider.url, secret_key=SECRET)
    assert judged(outcome(database)) == (expected, status, None)
    assert len(provider.received) == 1


def garbage(peer: Peer, _: Received) -> None:
    peer.send(b"nonsense\r\n\r\n")
    peer.close()


@pytest.mark.parametrize(
    ("script", "error"), [(hang, "timeout"), (reset, "reset"), (garbage, "protocol")]
)
def test_a_test_reports_the_fault_of_a_failed_exchange(
    script: Script,
    error: str,
    database: Environment,
    add_provider: AddProvider,
    make_provider: MakeProvider,
) -> None:
    add_provider(make_provider(script).url)
    with within(5):
        found = outcome(database | {"HTTP_CLIENT_TIMEOUT": "300ms"})
    assert judged(found) == ("unknown", None, error)
    if error == "timeout":
        assert 300 <= found["duration_ms"] < 2000


@pytest.mark.parametrize("to", ["", "nobody", "a@b\n", "a@b\udcff"])
def test_a_test_refuses_an_invalid_address(to: str, database: Environment) -> None:
    message = failed(database, "test", "1", "--to", to, code=2)
    assert message == "Error: Invalid value for --to: expected an email address"


def test_a_test_of_a_host_that_refuses_connections_is_not_sent(
    database: Environment, add_provider: AddProvider
) -> None:
    with refusing() as port:
        add_provider(f"http://{LOOPBACK}:{port}/")
        found = outcome(database)
        assert judged(found) == ("not_sent", None, "connect")
        assert found["detail"] == "connection refused"


def test_a_test_of_an_unknown_host_is_not_sent(
    database: Environment, add_provider: AddProvider
) -> None:
    add_provider("http://does-not-exist.invalid/")
    found = outcome(database)
    assert judged(found) == ("not_sent", None, "dns")
    assert found["detail"] in (
        "name or service not known",
        "temporary failure in name resolution",  # without a network
    )


def test_a_test_trusts_the_same_authorities_as_the_service(
    database: Environment,
    add_provider: AddProvider,
    make_provider: MakeProvider,
    certificate: tuple[Path, ssl.SSLContext],
) -> None:
    authority, context = certificate
    add_provider(make_provider(tls=context).url)
    found = outcome(database)
    assert judged(found) == ("not_sent", None, "tls")
    assert re.fullmatch("certificate verify failed: self.signed certificate", found["detail"])
    trusting = database | {"REQUESTS_CA_BUNDLE": str(authority)}
    assert judged(outcome(trusting)) == ("accepted", 200, None)


def test_a_test_uses_the_services_proxy(
    database: Environment,
    add_provider: AddProvider,
    make_provider: MakeProvider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = make_provider()
    monkeypatch.setenv("http_proxy", f"http://{proxy.endpoint}")
    add_provider("http://mail.example.com/v1/send")
    assert outcome(database)["outcome"] == "accepted"
    assert [received.path for received in proxy.received] == ["http://mail.example.com/v1/send"]


@pytest.mark.parametrize("url", ["nonsense", "ftp://mail.example.com/", "http://*.example.com/"])
def test_a_test_of_a_row_with_an_invalid_url_is_skipped(
    url: str, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(url)
    assert judged(outcome(database)) == ("skipped", None, "url")


def test_a_test_sends_the_same_request_as_the_service(
    database: Environment, add_provider: AddProvider, make_provider: MakeProvider
) -> None:
    provider = make_provider()
    add_provider(provider.url, "PushNotification", secret_key=SECRET)
    found = outcome(database)
    outcome(database, "--to", "me@example.com")
    first, second = provider.received
    assert (first.method, first.path) == ("POST", "/send")
    assert first.headers["content-type"] == "application/json"
    assert first.headers["user-agent"].startswith("notifier/")
    assert first.headers["x-request-id"] == found["request_id"] != second.headers["x-request-id"]
    assert first.json() == {
        "to": "notifier-test@example.com",
        "title": "Test",
        "message": "This is a test of the notifier. No action is needed.",
        "secret_key": SECRET,
    }
    assert second.json() == first.json() | {"to": "me@example.com"}
    assert logs.request_id.get() is None  # the id was set for the test message only


def test_a_test_shows_the_provider_and_the_outcome(
    database: Environment, add_provider: AddProvider, make_provider: MakeProvider
) -> None:
    provider = make_provider(answer(202))
    add_provider(provider.url, secret_key=SECRET)
    done(database, "remove", "1")
    header, row = cells(done(database, "test", "1"))
    shown = dict(zip(header, row, strict=True))
    assert float(shown.pop("duration_ms")) > 0
    assert re.fullmatch("[0-9a-f]{32}", shown.pop("request_id"))
    assert shown == {
        "id": "1",
        "channel": "Email",
        "name": "a provider",
        "host": provider.url,
        "state": "removed",
        "outcome": "accepted",
        "status": "202",
        "error": "-",
        "detail": "-",
    }


def test_a_test_prints_only_its_outcome_even_for_a_malformed_answer(
    database: Environment, add_provider: AddProvider, make_provider: MakeProvider
) -> None:
    """Otherwise libraries would log the malformed answer to standard error."""

    def odd(peer: Peer, _: Received) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\nno header\r\nContent-Length: x\r\n\r\n")
        peer.close()

    add_provider(make_provider(odd).url, secret_key=SECRET)
    with process(database, "test", "1") as running:
        output, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (0, b"")
    assert b"accepted" in output
    assert SECRET.encode() not in output
