"""The migrations: the schema they make, repeated and interrupted runs, and errors."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from click.testing import Result

from notifier.app import create_app
from notifier.models import Channel
from notifier.settings import Settings, available_cpus
from notifier.store import lock_waits, migrations
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from tests.fixtures import Environment, connect
from tests.service import ROOT, clean_environment
from tests.sockets import LOOPBACK, refusing, silent
from tests.timing import eventually
from tools.dev.cluster import SERVING

NAMES = [
    "0001_create_notification_provider_type",
    "0002_create_notification_preferences",
    "0003_index_active_preferences",
    "0004_create_change_notification",
    "0005_notify_of_changed_rows",
    "0006_notify_of_truncation",
]
TABLE = "notification_preferences"
LIMITED = (
    f"may open at most {4 * min(4, available_cpus()) * 1000} connections"
    " (4 * WEB_CONCURRENCY * WEB_INSTANCES)"
)
GRANTED = f"role {SERVING} may read {TABLE}\nrole {SERVING} {LIMITED}\n"
INDEX = "idx_notification_prefs_provider_deleted_active"
FUNCTION = "notify_of_notification_preferences"
TRIGGERS = ["notify_of_changed_rows", "notify_of_truncation"]

INDEXED = "(provider_type, priority) WHERE (deleted_at IS NULL)"

GO_SERVICE = """
    CREATE TYPE notification_provider_type AS ENUM ('Email', 'PushNotification');
    CREATE TABLE IF NOT EXISTS notification_preferences (
        id BIGSERIAL PRIMARY KEY,
        provider_type notification_provider_type NOT NULL,
        provider_name TEXT NOT NULL,
        host TEXT NOT NULL,
        priority INT DEFAULT 0,
        secret_key TEXT,
        created_at TIMESTAMPTZ DEFAULT NOW(),
        deleted_at TIMESTAMPTZ
    );
    CREATE INDEX idx_notification_prefs_provider_deleted_active
        ON notification_preferences (provider_type, priority) WHERE deleted_at IS NULL;
"""

Rows = list[tuple[Any, ...]]


def rows(environment: Environment, query: str) -> Rows:
    with connect(environment) as connection:
        return connection.execute(query).fetchall()


def execute(environment: Environment, statements: str) -> None:
    with connect(environment) as connection:
        connection.execute(statements)


def superuser_of(environment: Environment) -> Environment:
    """Return the environment with the test server's superuser, which has the owner's password."""
    return environment | {"DB_MIGRATION_USERNAME": "postgres"}


def settings_of(environment: Environment) -> Settings:
    return Settings.from_env(environment)


def columns(environment: Environment) -> Rows:
    """Return the columns with type, nullability and default.

    PostgreSQL adds a number to a sequence's name while a dying session holds that name; drop it.
    """
    return rows(
        environment,
        "SELECT column_name, udt_name, is_nullable, regexp_replace(column_default, '_seq1', '_seq')"
        f" FROM information_schema.columns WHERE table_name = '{TABLE}' ORDER BY ordinal_position",
    )


def indexes(environment: Environment) -> list[str]:
    query = f"SELECT indexdef FROM pg_indexes WHERE tablename = '{TABLE}' ORDER BY indexname"
    return [definition for (definition,) in rows(environment, query)]


def labels(environment: Environment) -> list[str]:
    query = (
        "SELECT enumlabel FROM pg_enum JOIN pg_type t ON t.oid = enumtypid"
        " WHERE typname = 'notification_provider_type' ORDER BY enumsortorder"
    )
    return [label for (label,) in rows(environment, query)]


def ours(environment: Environment) -> list[str]:
    """Return every table, index, sequence, type, function and trigger except yoyo's."""
    query = (
        "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE nspname = 'public'"
        " UNION SELECT typname FROM pg_type JOIN pg_namespace n ON n.oid = typnamespace"
        " WHERE nspname = 'public' AND typtype = 'e'"
        " UNION SELECT proname FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace"
        " WHERE nspname = 'public'"
        " UNION SELECT tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1"
    )
    return [name for (name,) in rows(environment, query) if "yoyo" not in name]


def assert_complete(environment: Environment) -> None:
    """Check that the schema is complete and that every migration is marked as applied."""
    assert labels(environment) == ["Email", "PushNotification"]
    assert columns(environment) == [
        ("id", "int8", "NO", f"nextval('{TABLE}_id_seq'::regclass)"),
        ("provider_type", "notification_provider_type", "NO", None),
        ("provider_name", "text", "NO", None),
        ("host", "text", "NO", None),
        ("priority", "int4", "YES", "0"),
        ("secret_key", "text", "YES", None),
        ("created_at", "timestamptz", "YES", "now()"),
        ("deleted_at", "timestamptz", "YES", None),
    ]
    assert indexes(environment) == [
        f"CREATE INDEX {INDEX} ON public.{TABLE} USING btree {INDEXED}",
        f"CREATE UNIQUE INDEX {TABLE}_pkey ON public.{TABLE} USING btree (id)",
    ]
    assert {FUNCTION, *TRIGGERS} <= {*ours(environment)}
    marked = "SELECT migration_id FROM _yoyo_migration ORDER BY 1"
    assert rows(environment, marked) == [(name,) for name in NAMES]


def run(environment: Environment, *command: str) -> Result:
    """Run `flask --app notifier.app` with `command`, in this process."""
    app = create_app(Settings.from_env(environment))
    return app.test_cli_runner().invoke(args=command)


def start(environment: Environment, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "notifier.app", *command],
        cwd=ROOT,
        env=clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def migrating(environment: Environment) -> Iterator[subprocess.Popen[str]]:
    """Run `migrate` in its own process, which is killed if it outlives the block."""
    with start(environment, "migrate") as process:
        try:
            yield process
        finally:
            process.kill()


def waiting(environment: Environment) -> int:
    """Return how many server processes wait within a step for another session's lock."""
    query = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND wait_event_type = 'Lock' AND wait_event <> 'advisory'"
    )
    return len(rows(environment, query))


def test_migrate_creates_the_schema_and_a_second_run_does_nothing(
    empty_database: Environment,
) -> None:
    first, second = run(empty_database, "migrate"), run(empty_database, "migrate")
    applied = "".join(f"applied {name}\n" for name in NAMES)
    nothing = "nothing to apply, the schema is up to date\n"
    assert (first.exit_code, first.output) == (0, applied + GRANTED)
    assert (second.exit_code, second.output) == (0, nothing + GRANTED)
    assert_complete(empty_database)


def test_the_type_accepts_only_the_two_channels(
    database: Environment, add_provider: Callable[..., int]
) -> None:
    add_provider("http://a/", "Email")
    add_provider("http://a/", "PushNotification")
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        add_provider("http://a/", "email")


def test_each_rollback_undoes_one_migration_until_nothing_is_left(
    empty_database: Environment,
) -> None:
    migrations.migrate(settings_of(empty_database))
    table = [TABLE, f"{TABLE}_id_seq", f"{TABLE}_pkey"]
    left = [
        [INDEX, *table, TRIGGERS[0], FUNCTION],
        [INDEX, *table, FUNCTION],
        [INDEX, *table],
        table,
        [],
        [],
    ]
    for name, expected in zip(reversed(NAMES), left, strict=True):
        result = run(empty_database, "rollback")
        assert (result.exit_code, result.output) == (0, f"rolled back {name}\n")
        enum = [] if name == NAMES[0] else ["notification_provider_type"]
        assert ours(empty_database) == sorted(expected + enum)
    result = run(empty_database, "rollback")
    assert (result.exit_code, result.output) == (0, "nothing to roll back\n")
    assert migrations.migrate(settings_of(empty_database)).applied == NAMES
    assert_complete(empty_database)


def test_a_database_that_was_never_migrated_has_nothing_to_undo(
    empty_database: Environment,
) -> None:
    assert run(empty_database, "rollback").output == "nothing to roll back\n"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_migrate_at_the_same_time_all_succeed(
    empty_database: Environment, processes: int
) -> None:
    with ExitStack() as stack:
        running = [stack.enter_context(migrating(empty_database)) for _ in range(processes)]
        ended = [(*process.communicate(timeout=60), process.returncode) for process in running]
    assert [(errors, status) for _, errors, status in ended] == [("", 0)] * processes
    applied = [line for output, _, _ in ended for line in output.splitlines() if "applied" in line]
    assert applied == [f"applied {name}" for name in NAMES]
    assert_complete(empty_database)


# For each step: the statement of another session that blocks it, and the steps applied before.
CONFLICTS = {
    NAMES[0]: ("CREATE TYPE notification_provider_type AS ENUM ('other')", 0),
    NAMES[1]: (f"CREATE TABLE {TABLE} (id INT)", 1),
    NAMES[2]: (f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE", 2),
    NAMES[3]: (f"CREATE FUNCTION {FUNCTION}() RETURNS int RETURN 1", 3),
    NAMES[4]: (f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE", 4),
    NAMES[5]: (f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE", 5),
}


@pytest.mark.parametrize("step", CONFLICTS)
def test_a_run_that_is_killed_within_a_step_does_not_block_the_next(
    empty_database: Environment, step: str
) -> None:
    conflict, done = CONFLICTS[step]
    settings = settings_of(empty_database)
    migrations.migrate(settings)
    for _ in NAMES[done:]:
        migrations.rollback(settings)
    with connect(empty_database) as other, migrating(empty_database) as killed:
        other.execute("BEGIN")
        other.execute(conflict)
        eventually(lambda: waiting(empty_database) == 1)
        killed.kill()
        assert killed.wait(10) == -signal.SIGKILL
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(run, empty_database, "migrate")
            # The killed run's server process has not noticed and still waits.
            eventually(lambda: waiting(empty_database) == 2)
            other.execute("ROLLBACK")
            result = following.result(60)
    assert result.exit_code == 0
    assert result.output == "".join(f"applied {name}\n" for name in NAMES[done:]) + GRANTED
    assert_complete(empty_database)


def test_the_servers_limit_on_idle_transactions_does_not_end_the_lock(
    empty_database: Environment,
) -> None:
    name, conflict = empty_database["DB_NAME"], CONFLICTS[NAMES[0]][0]
    held_for_long = (
        "SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory'"
        " AND datname = current_database() AND now() - state_change > interval '3 s'"
    )
    with connect(empty_database) as other:  # connected before the limit applies
        limit = "SET idle_in_transaction_session_timeout = '2s'"
        other.execute(f"ALTER DATABASE {name} {limit}")
        other.execute("BEGIN")
        other.execute(conflict)
        with migrating(empty_database) as process:
            eventually(lambda: rows(empty_database, held_for_long))
            other.execute("ROLLBACK")
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("applied", [False, True])
def test_a_lock_row_of_a_killed_process_does_not_block_a_migration(
    empty_database: Environment, applied: bool
) -> None:
    if applied:
        migrations.migrate(settings_of(empty_database))
        migrations.rollback(settings_of(empty_database))
    execute(
        empty_database,
        "CREATE TABLE IF NOT EXISTS yoyo_lock"
        " (locked INT DEFAULT 1 PRIMARY KEY, ctime TIMESTAMP, pid INT NOT NULL);"
        "INSERT INTO yoyo_lock VALUES (1, now(), 99999)",
    )
    assert migrations.migrate(settings_of(empty_database)).applied == (
        NAMES[-1:] if applied else NAMES
    )
    assert_complete(empty_database)
    assert rows(empty_database, "SELECT FROM yoyo_lock") == []


@pytest.mark.parametrize("names", [*([name] for name in NAMES), NAMES])
def test_a_step_that_was_applied_but_not_marked_can_be_applied_again(
    empty_database: Environment, names: list[str]
) -> None:
    settings = settings_of(empty_database)
    migrations.migrate(settings)
    for name in names:
        execute(empty_database, f"DELETE FROM _yoyo_migration WHERE migration_id = '{name}'")
    assert migrations.migrate(settings).applied == names
    assert_complete(empty_database)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_was_undone_but_is_still_marked_can_be_undone_again(
    empty_database: Environment, name: str
) -> None:
    """A rollback that is killed before it removes the mark leaves this state."""
    settings = settings_of(empty_database)
    migrations.migrate(settings)
    while (undone := migrations.rollback(settings)) != name:
        assert undone
    execute(
        empty_database,
        "INSERT INTO _yoyo_migration (migration_hash, migration_id, applied_at_utc)"
        f" SELECT DISTINCT migration_hash, migration_id, now() FROM _yoyo_log"
        f" WHERE migration_id = '{name}'",
    )
    assert migrations.rollback(settings) == name
    assert migrations.migrate(settings).applied
    assert_complete(empty_database)


def test_a_database_of_the_go_service_is_adopted_with_its_rows(
    empty_database: Environment,
) -> None:
    execute(
        empty_database,
        GO_SERVICE + f"INSERT INTO {TABLE} (provider_type, provider_name, host, deleted_at) VALUES"
        " ('Email', 'one', 'http://a/', NULL), ('PushNotification', 'two', 'http://b/', now())",
    )
    before = rows(empty_database, f"SELECT * FROM {TABLE} ORDER BY id")
    assert migrations.migrate(settings_of(empty_database)).applied == NAMES
    assert_complete(empty_database)
    assert rows(empty_database, f"SELECT * FROM {TABLE} ORDER BY id") == before
    assert len(before) == 2


def test_a_database_without_an_encoding_works_too(empty_database: Environment) -> None:
    """Without a client encoding of ours psycopg would return bytes for its texts."""
    name = f"ascii_{empty_database['DB_NAME']}"
    create = f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'"
    execute(empty_database, f"{create} LOCALE_PROVIDER libc")
    ascii_database = empty_database | {"DB_NAME": name}
    assert migrations.migrate(settings_of(ascii_database)).applied == NAMES
    row = " (provider_type, provider_name, host) VALUES ('Email', 'Grüße', 'http://a/')"
    execute(ascii_database, f"INSERT INTO {TABLE}{row}")
    preferences = Preferences(Database(settings_of(ascii_database)), 60)
    (provider,) = preferences.for_channel(Channel.EMAIL, time.monotonic() + 10)
    assert (provider.name, provider.url) == ("Grüße", "http://a/")


@pytest.mark.parametrize("lock", ["pg_advisory_lock", "pg_advisory_lock_shared"])
def test_the_holders_of_the_lock_are_named_in_one_line(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    """Any role may take the lock, the serving role included."""
    migrations.migrate(settings_of(empty_database))
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    shared = lock.endswith("shared")
    with ExitStack() as stack:
        places = [Database(settings_of(empty_database)) for _ in range(1 + shared)]
        others = [stack.enter_context(place.connect()) for place in places]
        for other in others:
            other.execute(f"SELECT {lock}({migrations.LOCK_KEY})".encode())
            other.execute("SELECT pg_advisory_lock(1)" if other is others[0] else "SELECT 1")
        pids = sorted(other.info.backend_pid for other in others)
        held = [f'process {pid} of role {SERVING} ("notification-service")' for pid in pids]
        ends = "; ".join(f"SELECT pg_terminate_backend({pid})" for pid in pids)
        for command in ("migrate", "rollback"):
            result = run(empty_database, command)
            assert result.exit_code == 1
            assert result.output == (
                f"Error: the migration lock has been held for 0.4s by {', '.join(held)}: try"
                " again when that has finished; if it is not a migration, ask an administrator"
                f" to run: {ends}\n"
            )
        execute(superuser_of(empty_database), ends)
        assert run(empty_database, "migrate").exit_code == 0


@pytest.mark.parametrize("command", ["migrate", "migrate again", "rollback"])
@pytest.mark.parametrize(
    "statement",
    [
        f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE _yoyo_migration IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE _yoyo_version IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE yoyo_lock IN ACCESS EXCLUSIVE MODE",
    ],
)
def test_the_holders_of_other_locks_are_named_in_one_line(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch, statement: str, command: str
) -> None:
    settings = settings_of(empty_database)
    migrations.migrate(settings)
    if command == "migrate":
        migrations.rollback(settings)  # so a step is pending
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    with connect(empty_database) as other:
        other.execute("BEGIN")
        other.execute(statement.encode())
        pid = other.info.backend_pid
        result = run(empty_database, command.removesuffix(" again"))
        other.execute("ROLLBACK")
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert line.startswith(
        f"Error: another lock that this needs has been held for 0.4s by process {pid} of role "
    )
    assert line.endswith(f"SELECT pg_terminate_backend({pid})")
    assert run(empty_database, "migrate").exit_code == 0


def test_a_migration_that_fails_prints_first_the_steps_that_it_has_applied(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = NAMES[3]
    conflict, done = CONFLICTS[step]
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    with connect(empty_database) as other:
        other.execute("BEGIN")
        other.execute(conflict)
        result = run(empty_database, "migrate")
        other.execute("ROLLBACK")
    assert result.exit_code == 1
    *applied, error = result.output.splitlines()
    assert applied == [f"applied {name}" for name in NAMES[:done]]
    assert error.startswith("Error: another lock that this needs has been held")


def test_a_rollback_does_not_wait_for_an_idle_transaction_of_the_serving_role(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.migrate(settings_of(empty_database))
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    with Database(settings_of(empty_database)).connect() as other:
        other.execute("BEGIN")
        other.execute(f"SELECT FROM {TABLE}".encode())
        result = run(empty_database, "rollback")
        named = f"by process {other.info.backend_pid} of role {SERVING} ("
    assert result.exit_code == 1
    assert named in result.output


def test_a_session_that_waits_for_the_lock_too_is_not_named(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(empty_database) as other, migrating(empty_database):
        pid = other.info.backend_pid
        other.execute("SELECT pg_advisory_lock(%s)", (migrations.LOCK_KEY,))
        waits = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: rows(empty_database, waits))
        monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
        result = run(empty_database, "migrate")
        other.execute("SELECT pg_advisory_unlock_all()")
    assert result.output.count("process ") == 1
    assert f"by process {pid} of role" in result.output


def test_a_prepared_transaction_has_no_process_to_name(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    monkeypatch.setattr(lock_waits, "_HOLDERS", "SELECT WHERE %s::int[] IS NULL")
    with connect(empty_database) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (migrations.LOCK_KEY,))
        result = run(empty_database, "migrate")
    line = "Error: the migration lock has been held for 0.4s by an unknown session; try again\n"
    assert (result.exit_code, result.output) == (1, line)


def assert_one_line(environment: Environment, expected: str) -> None:
    """Check that `migrate` fails with one line that gives the reason and no password."""
    result = run(environment, "migrate")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert_line(result.output, environment, expected)


def assert_line(output: str, environment: Environment, expected: str) -> None:
    assert output.count("\n") == 1, output
    assert output.startswith("Error: PostgreSQL: ")
    assert expected in output
    assert environment["DB_PASSWORD"] not in output
    assert environment["DB_MIGRATION_PASSWORD"] not in output


def test_a_wrong_password_is_reported_in_one_line(empty_database: Environment) -> None:
    wrong = empty_database | {"DB_MIGRATION_PASSWORD": "not-the-p4ssword"}
    with migrating(wrong) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (1, "")
    assert_line(errors, wrong, "password authentication failed")


def test_a_missing_database_is_reported_in_one_line(empty_database: Environment) -> None:
    assert_one_line(empty_database | {"DB_NAME": "missing"}, "does not exist")


def test_a_role_that_may_not_create_tables_is_reported_in_one_line(
    empty_database: Environment, server: Environment
) -> None:
    """PostgreSQL 15 and later let only a database's owner create tables in it."""
    name = f"guest_{empty_database['DB_NAME']}"
    execute(server, f"CREATE ROLE {name} LOGIN PASSWORD 'guests-p4ssword'")
    guest = {"DB_MIGRATION_USERNAME": name, "DB_MIGRATION_PASSWORD": "guests-p4ssword"}
    assert_one_line(empty_database | guest, "permission denied")


@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
def test_an_unreachable_server_is_reported_in_one_line(server: Environment, host: str) -> None:
    with refusing() as port:
        nowhere = {"DB_HOST": host, "DB_PORT": str(port)}
        assert_one_line(server | nowhere, "Connection refused")


def test_a_silent_server_is_reported_in_one_line(server: Environment) -> None:
    with silent() as port:
        assert_one_line(server | {"DB_PORT": str(port)}, "timeout")


def test_an_unknown_host_name_is_reported_in_one_line(server: Environment) -> None:
    assert_one_line(server | {"DB_HOST": "does-not-exist.invalid"}, "does-not-exist.invalid")
