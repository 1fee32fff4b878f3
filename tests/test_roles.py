"""The serving role: the migration creates it; it may read the providers and nothing else."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from notifier.app import create_app
from notifier.models import Channel
from notifier.settings import Settings
from notifier.store import lock_waits, migrations, roles
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.store.roles import NotGranted
from tests.fixtures import Environment, connect, create_database
from tests.test_migrations import (
    GRANTED,
    LIMITED,
    NAMES,
    SERVING,
    execute,
    migrating,
    rows,
    run,
    waiting,
)
from tests.timing import eventually

TABLE = "notification_preferences"
ROW = f"INSERT INTO {TABLE} (provider_type, provider_name, host) VALUES ('Email', 'a', 'http://a/')"
SUPERUSERS_PASSWORD = "the superuser's password"  # a key that only these tests read
ADVICE = "ask an administrator to run: "

MakeMigrator = Callable[..., Environment]


def with_role(environment: Environment, name: str = "", password: str = "") -> Environment:
    """Return the environment with its own serving role: databases of a server share its roles."""
    name = name or f"serving_{environment['DB_NAME']}"
    ours = {"DB_USERNAME": name, "DB_PASSWORD": password or f"password of {name}"}
    owners = environment["DB_MIGRATION_PASSWORD"]  # the superuser's is the same
    return {SUPERUSERS_PASSWORD: owners} | environment | ours


def superuser(environment: Environment) -> Environment:
    """Return the environment with the server's superuser as the migrating role."""
    return environment | {
        "DB_MIGRATION_USERNAME": "postgres",
        "DB_MIGRATION_PASSWORD": environment[SUPERUSERS_PASSWORD],
    }


def execute_as_superuser(environment: Environment, statements: str) -> None:
    execute(superuser(environment), statements)


def serving(environment: Environment) -> psycopg.Connection[Any]:
    return Database(Settings.from_env(environment)).connect()


def can_read(environment: Environment) -> bool:
    """Return True if the serving role can log in and reads an empty table."""
    database = Database(Settings.from_env(environment))
    found = Preferences(database, 60).for_channel(Channel.EMAIL, time.monotonic() + 10)
    return found == ()


def may(environment: Environment, statement: str) -> bool:
    """Return True if the serving role may run a statement, which is undone."""
    with serving(environment) as connection, connection.transaction(force_rollback=True):
        try:
            connection.execute(statement.encode())
        except InsufficientPrivilege:
            return False
    return True


def migrate(environment: Environment) -> list[str]:
    """Migrate; return the notices except those that tell of success, and the hint to `check-role`.

    The hint must appear exactly if that command finds something beyond the notices.
    """
    granted, *notices = migrations.migrate(Settings.from_env(environment)).notices
    name = environment["DB_USERNAME"]
    assert granted == f"role {name} may read {TABLE}"
    hint = f"role {name} can do more than read: run flask --app notifier.app check-role"
    assert (hint in notices) == bool({*check_role(environment)} - {*notices})
    return [notice for notice in notices if notice not in (hint, f"role {name} {LIMITED}")]


def check_role(environment: Environment) -> list[str]:
    """Run `check-role` and return its findings, one per line."""
    result = run(environment, "check-role")
    findings = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (1 if findings else 0, "") or findings == [
        f"role {environment['DB_USERNAME']} can read the providers and do nothing else"
    ]
    return findings if result.exit_code else []


def excess(environment: Environment) -> list[str]:
    """Migrate, which revokes what it can; return the findings of `check-role` that remain."""
    assert migrate(environment) == []
    return check_role(environment)


def refusal(environment: Environment) -> str:
    """Run the command `migrate`, which must fail with one line, and return that line.

    Before that, the command prints the migrations that it has applied.
    """
    result = run(environment, "migrate")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert {*result.stdout.splitlines()} <= {f"applied {name}" for name in NAMES}
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: the schema is up to date, but ")
    return result.stderr.removeprefix("Error: the schema is up to date, but ").rstrip()


def obey(environment: Environment, line: str) -> None:
    """Run the statements that a line advises an administrator to run."""
    _, found, statements = line.partition(ADVICE)
    assert found, line
    execute_as_superuser(environment, statements)


@pytest.fixture(scope="module")
def migrated(server: Environment) -> Environment:
    """A migrated database with one row, for tests that change nothing."""
    environment = with_role(create_database(server))
    assert migrate(environment) == []
    execute(environment, ROW)
    return environment


@pytest.fixture
def fresh(empty_database: Environment) -> Environment:
    """A database that is not migrated, with a serving role that does not exist yet."""
    return with_role(empty_database)


@pytest.fixture
def make_migrator(fresh: Environment) -> MakeMigrator:
    """Make a migrating role with the given attributes, and a database for it."""

    def make(attributes: str = "", *, owner: bool = True) -> Environment:
        name = f"migrator_{fresh['DB_NAME']}"
        execute_as_superuser(fresh, f"CREATE ROLE {name} LOGIN {attributes} PASSWORD 'migrates'")
        if owner:
            execute_as_superuser(fresh, f"ALTER DATABASE {fresh['DB_NAME']} OWNER TO {name}")
        else:
            execute_as_superuser(
                fresh,
                f"ALTER DATABASE {fresh['DB_NAME']} OWNER TO postgres;"
                f" GRANT CREATE, USAGE ON SCHEMA public TO {name}",
            )
        return fresh | {"DB_MIGRATION_USERNAME": name, "DB_MIGRATION_PASSWORD": "migrates"}

    return make


# --- privileges of the serving role


def test_the_serving_role_reads_the_providers(migrated: Environment) -> None:
    with serving(migrated) as connection:
        query = f"SELECT provider_name FROM {TABLE}"
        assert connection.execute(query.encode()).fetchall() == [("a",)]


def test_the_serving_role_listens(migrated: Environment) -> None:
    with serving(migrated) as connection, connect(migrated) as owner:
        connection.execute("LISTEN anything")
        owner.execute("NOTIFY anything")
        (notification,) = connection.notifies(timeout=10, stop_after=1)
        assert notification.channel == "anything"


@pytest.mark.parametrize(
    "statement",
    [
        f"DROP TABLE {TABLE}",
        f"ALTER TABLE {TABLE} ADD COLUMN mine INT",
        f"ALTER TABLE {TABLE} DISABLE TRIGGER ALL",
        f"TRUNCATE {TABLE}",
        ROW,
        f"UPDATE {TABLE} SET host = 'http://b/'",
        f"DELETE FROM {TABLE}",
        f"SELECT FROM {TABLE} FOR UPDATE",
        f"BEGIN; LOCK TABLE {TABLE} IN ROW SHARE MODE",
        f"CREATE INDEX ON {TABLE} (host)",
        f"SELECT nextval('{TABLE}_id_seq')",
        f"SELECT setval('{TABLE}_id_seq', 1)",
        "ALTER TYPE notification_provider_type ADD VALUE 'Mine'",
        "CREATE TABLE mine ()",
        "CREATE TEMPORARY TABLE mine ()",
        "CREATE FUNCTION mine() RETURNS INT LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA mine",
        "DROP SCHEMA public CASCADE",
        "CREATE DATABASE mine",
        "CREATE ROLE mine",
        "ALTER ROLE CURRENT_USER CREATEROLE",
        "SET ROLE notifier",
        "SELECT FROM _yoyo_migration",
        "DELETE FROM _yoyo_migration",
        "INSERT INTO yoyo_lock (pid) VALUES (1)",
        "DROP TABLE yoyo_lock",
        f"COPY {TABLE} TO PROGRAM 'cat'",
        f"COPY {TABLE} FROM PROGRAM 'true'",
        f"COPY {TABLE} TO '/tmp/mine'",
        "SELECT pg_read_file('PG_VERSION')",
        "SELECT rolpassword FROM pg_authid",
    ],
)
def test_the_serving_role_is_refused_everything_else(migrated: Environment, statement: str) -> None:
    with serving(migrated) as connection, pytest.raises(InsufficientPrivilege):
        connection.execute(statement.encode())


def test_other_roles_may_no_longer_create_anything_in_the_database(migrated: Environment) -> None:
    other = f"other_{migrated['DB_NAME']}"
    execute(migrated, f"CREATE ROLE {other} LOGIN PASSWORD 'other'")
    stranger = with_role(migrated, other, "other")
    assert not may(stranger, "CREATE TEMPORARY TABLE mine ()")
    assert not may(stranger, "CREATE SCHEMA mine")
    assert not may(stranger, "CREATE TABLE mine ()")


def test_the_next_migration_revokes_all_other_privileges(fresh: Environment) -> None:
    migrate(fresh)
    name = f'"{fresh["DB_USERNAME"]}"'
    execute(
        fresh,
        f"GRANT ALL ON {TABLE} TO {name} WITH GRANT OPTION;"
        f" GRANT UPDATE (host) ON {TABLE} TO {name};"
        f" GRANT ALL ON SEQUENCE {TABLE}_id_seq TO {name}; GRANT ALL ON SCHEMA public TO {name};"
        f" GRANT ALL ON DATABASE {fresh['DB_NAME']} TO {name}",
    )
    statements = [
        ROW,
        f"UPDATE {TABLE} SET host = ''",
        f"SELECT nextval('{TABLE}_id_seq')",
        "CREATE TABLE mine ()",
        "CREATE SCHEMA mine",
        "CREATE TEMPORARY TABLE mine ()",
    ]
    assert [may(fresh, statement) for statement in statements] == [True] * 6
    assert migrate(fresh) == []
    assert [may(fresh, statement) for statement in statements] == [False] * 6
    assert can_read(fresh)


def test_a_recreated_schema_can_be_read(fresh: Environment) -> None:
    migrate(fresh)
    for _ in NAMES:
        assert run(fresh, "rollback").exit_code == 0
    assert migrate(fresh) == []
    assert can_read(fresh)


def test_a_table_in_another_schema_can_be_read(fresh: Environment) -> None:
    execute(
        fresh,
        'CREATE SCHEMA "Our tables";'
        f'ALTER DATABASE {fresh["DB_NAME"]} SET search_path = "Our tables"',
    )
    assert migrate(fresh) == []
    assert can_read(fresh)
    assert not may(fresh, "CREATE TABLE mine ()")


def test_the_serving_role_keeps_its_privilege_while_it_is_granted_again(
    fresh: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is in one transaction, so an interrupted migration changes nothing."""
    migrate(fresh)
    run_if_allowed, statements = roles.run_if_allowed, []

    def cut_off(connection: psycopg.Connection[Any], statement: str) -> None:
        statements.append(statement)
        if statement.startswith("GRANT SELECT"):
            assert can_read(fresh)
            raise psycopg.OperationalError("the connection broke")
        run_if_allowed(connection, statement)

    monkeypatch.setattr(roles, "run_if_allowed", cut_off)
    with pytest.raises(psycopg.OperationalError):
        migrate(fresh)
    assert [statement for statement in statements if "ALL ON TABLE" in statement]
    assert can_read(fresh)


# --- the role's name and password


@pytest.mark.parametrize(
    "name", ["Notifier", "o'brien", "two words", "dash-ed", 'gr"üße', "%s {} $1 \\", "n" * 70]
)
def test_the_roles_name_may_have_any_characters(empty_database: Environment, name: str) -> None:
    environment = with_role(empty_database, name)
    migrations.migrate(Settings.from_env(environment))
    migrations.migrate(Settings.from_env(environment))
    assert can_read(environment)
    assert not may(environment, ROW)


@pytest.mark.parametrize(
    "password",
    ["it's", 'a "quoted" one', "back\\slash", "%s {} $1", " blank ", "Grüße € 😀", "x" * 200],
    ids=lambda password: password[:16],
)
def test_the_roles_password_may_have_any_characters(fresh: Environment, password: str) -> None:
    environment = fresh | {"DB_PASSWORD": password}
    migrate(environment)
    assert can_read(environment)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        serving(environment | {"DB_PASSWORD": f"{password}!"})


def test_the_next_migration_sets_a_new_password(fresh: Environment) -> None:
    migrate(fresh)
    changed = fresh | {"DB_PASSWORD": "another password"}
    assert migrate(changed) == []
    assert can_read(changed)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        serving(fresh)


def test_the_server_never_sees_the_password(fresh: Environment) -> None:
    """The server's log has every statement and every parameter of the migration."""
    password = "never-to-be-seen"
    execute_as_superuser(fresh, f"ALTER DATABASE {fresh['DB_NAME']} SET log_statement = 'all'")
    for _ in range(2):  # the role is created, then altered
        migrate(fresh | {"DB_PASSWORD": password})
    ((data,),) = rows(superuser(fresh), "SHOW data_directory")
    log = Path(data).with_name("server.log").read_text()
    for verb in ("CREATE", "ALTER"):
        stored = f'{verb} ROLE "{fresh["DB_USERNAME"]}" LOGIN PASSWORD \'SCRAM-SHA-256$'
        assert stored in log
    assert password not in log
    query = f"SELECT rolpassword FROM pg_authid WHERE rolname = '{fresh['DB_USERNAME']}'"
    ((verifier,),) = rows(superuser(fresh), query)
    assert verifier.startswith("SCRAM-SHA-256$")


def test_a_missing_password_file_is_reported_in_one_line(
    fresh: Environment, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("from a file\n")
    from_file = fresh | {"DB_PASSWORD": "", "DB_PASSWORD_FILE": str(file)}
    migrate(from_file)
    assert can_read(from_file)
    app = create_app(Settings.from_env(from_file))
    file.unlink()
    result = app.test_cli_runner().invoke(args=["migrate"])
    assert result.exit_code == 1
    expected = "Error: the schema is up to date, but DB_PASSWORD_FILE cannot be read\n"
    assert result.output == expected


# --- one role that migrates and serves


def acls(environment: Environment) -> list[tuple[Any, ...]]:
    """Return the access privileges of the table, its schema and the database."""
    return rows(
        environment,
        f"SELECT relacl::text FROM pg_class WHERE oid = '{TABLE}'::regclass"
        " UNION ALL SELECT nspacl::text FROM pg_namespace WHERE nspname = 'public'"
        " UNION ALL SELECT datacl::text FROM pg_database WHERE datname = current_database()",
    )


def test_if_one_role_migrates_and_serves_nothing_is_granted_and_its_password_stays(
    empty_database: Environment,
) -> None:
    owner = empty_database["DB_MIGRATION_USERNAME"]
    both = with_role(empty_database, owner, "not the password")
    applied = "".join(f"applied {name}\n" for name in NAMES)
    assert run(both, "migrate").output == applied
    table, _, database = acls(both)
    assert (table, database) == ((None,), (None,))
    before = acls(both)
    assert run(both, "migrate").output == "nothing to apply, the schema is up to date\n"
    assert acls(both) == before
    connect(both).close()  # with its old password


def test_if_one_role_with_a_long_name_migrates_and_serves_nothing_is_granted(
    fresh: Environment,
) -> None:
    """PostgreSQL truncates the name of a role to 63 bytes."""
    name = fresh["DB_NAME"] + "x" * 70
    execute_as_superuser(fresh, f"CREATE ROLE {name} LOGIN PASSWORD 'both'")
    execute_as_superuser(fresh, f"ALTER DATABASE {fresh['DB_NAME']} OWNER TO {name}")
    both = with_role(fresh, name, "both")
    owner = {"DB_MIGRATION_USERNAME": name, "DB_MIGRATION_PASSWORD": "both"}
    assert migrations.migrate(Settings.from_env(both | owner)).notices == []


def test_a_database_with_one_role_that_owned_everything_is_adopted(
    make_migrator: MakeMigrator,
) -> None:
    new = make_migrator("CREATEROLE")
    old = with_role(new, new["DB_MIGRATION_USERNAME"], new["DB_MIGRATION_PASSWORD"])
    for name in ("DB_MIGRATION_USERNAME", "DB_MIGRATION_PASSWORD"):
        del old[name]
    assert migrations.migrate(Settings.from_env(old)).notices == []
    assert can_read(old)
    assert migrate(new) == []
    assert can_read(new)
    assert not may(new, ROW)


# --- a migrating role with limited privileges


def test_without_createrole_the_error_gives_the_statement_that_creates_the_role(
    make_migrator: MakeMigrator,
) -> None:
    environment = make_migrator()
    name, migrator = environment["DB_USERNAME"], environment["DB_MIGRATION_USERNAME"]
    assert refusal(environment) == (
        f"role {name} does not exist, and {migrator} cannot create it: {ADVICE}"
        f"CREATE ROLE \"{name}\" LOGIN PASSWORD '...'"
        f' (or ALTER ROLE "{migrator}" CREATEROLE, and migrate again)'
    )
    execute_as_superuser(environment, f'ALTER ROLE "{migrator}" CREATEROLE')
    assert migrate(environment) == []
    assert can_read(environment)


def test_a_role_that_cannot_serve_hides_none_of_the_applied_migrations(
    make_migrator: MakeMigrator,
) -> None:
    result = run(make_migrator(), "migrate")
    assert result.exit_code == 1
    assert result.stdout == "".join(f"applied {name}\n" for name in NAMES)


@pytest.mark.parametrize("attributes", ["", "CREATEROLE"])
def test_a_serving_role_that_cannot_be_altered_keeps_its_password_and_gets_the_grants(
    make_migrator: MakeMigrator, attributes: str
) -> None:
    """Since PostgreSQL 16 CREATEROLE covers only roles that its holder has created."""
    environment = make_migrator(attributes) | {"DB_PASSWORD": "as it was"}
    name, database = environment["DB_USERNAME"], environment["DB_NAME"]
    execute_as_superuser(environment, f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'as it was'")
    notices = migrate(environment)
    connections, limit = notices
    assert connections == (
        f'role {name} has no connection limit: {ADVICE}ALTER ROLE "{name}" CONNECTION LIMIT'
        f" {LIMITED.split()[4]}"
    )
    assert limit == (
        f'role {name} has no statement_timeout: {ADVICE}ALTER ROLE "{name}" IN DATABASE'
        f" \"{database}\" SET statement_timeout = '10s'"
    )
    assert check_role(environment) == notices
    assert can_read(environment)
    for notice in notices:
        obey(environment, notice)
    assert migrate(environment) == check_role(environment) == []


def test_a_password_that_cannot_be_set_and_is_another_is_reported(
    make_migrator: MakeMigrator,
) -> None:
    environment = make_migrator()
    name = environment["DB_USERNAME"]
    execute_as_superuser(environment, f"CREATE ROLE \"{name}\" LOGIN PASSWORD 'as it was'")
    line = refusal(environment)
    assert line.startswith(f"role {name} cannot log in, so the service cannot either: ")
    assert f'password authentication failed for user "{name}"' in line
    assert line.endswith(f": {ADVICE}ALTER ROLE \"{name}\" LOGIN PASSWORD '...'")
    assert line in check_role(environment)
    obey(environment, line.replace("...", environment["DB_PASSWORD"]))
    migrate(environment)
    assert can_read(environment)


def test_a_password_that_has_expired_is_reported(fresh: Environment) -> None:
    migrate(fresh)
    name = fresh["DB_USERNAME"]
    execute_as_superuser(fresh, f"ALTER ROLE \"{name}\" VALID UNTIL '2001-01-01'")
    line = refusal(fresh)
    assert line.endswith(f": {ADVICE}ALTER ROLE \"{name}\" VALID UNTIL 'infinity'")
    obey(fresh, line)
    assert migrate(fresh) == []


def test_a_role_that_may_not_log_in_cannot_serve(make_migrator: MakeMigrator) -> None:
    environment = make_migrator()
    name = environment["DB_USERNAME"]
    execute_as_superuser(environment, f"CREATE ROLE \"{name}\" PASSWORD 'as it was'")
    line = refusal(environment)
    assert line == f'role {name} cannot serve yet: {ADVICE}ALTER ROLE "{name}" LOGIN'
    obey(environment, line)
    known = environment | {"DB_PASSWORD": "as it was"}
    migrate(known)
    assert can_read(known)


def test_another_owners_database_stays_open_and_is_reported(make_migrator: MakeMigrator) -> None:
    environment = make_migrator("CREATEROLE", owner=False)
    name = environment["DB_NAME"]
    (notice,) = excess(environment)
    assert notice == (
        f"every role has TEMPORARY on database {name}: {ADVICE}"
        f'REVOKE TEMPORARY ON DATABASE "{name}" FROM PUBLIC'
    )
    assert can_read(environment)
    assert may(environment, "CREATE TEMPORARY TABLE mine ()")
    obey(environment, notice)
    assert migrate(environment) == []
    assert not may(environment, "CREATE TEMPORARY TABLE mine ()")


def test_another_owners_open_schema_is_reported(make_migrator: MakeMigrator) -> None:
    """Databases created by PostgreSQL 14 and earlier have an open schema."""
    environment = make_migrator("CREATEROLE", owner=False)
    execute_as_superuser(
        environment,
        f"REVOKE TEMPORARY ON DATABASE {environment['DB_NAME']} FROM PUBLIC;"
        " GRANT CREATE ON SCHEMA public TO PUBLIC",
    )
    (notice,) = excess(environment)
    assert notice == (
        f"every role has CREATE on schema public: {ADVICE}"
        'REVOKE CREATE ON SCHEMA "public" FROM PUBLIC'
    )
    obey(environment, notice)
    assert migrate(environment) == []


def test_possible_grants_are_made_and_impossible_ones_are_reported(
    make_migrator: MakeMigrator,
) -> None:
    environment = make_migrator("CREATEROLE", owner=False)
    name, migrator = environment["DB_USERNAME"], environment["DB_MIGRATION_USERNAME"]
    database = environment["DB_NAME"]
    execute_as_superuser(
        environment,
        f"REVOKE ALL ON DATABASE {database} FROM PUBLIC; REVOKE ALL ON SCHEMA public FROM PUBLIC;"
        f" GRANT CONNECT ON DATABASE {database} TO {migrator}",
    )
    line = refusal(environment)
    assert line == (
        f'role {name} cannot serve yet: {ADVICE}GRANT CONNECT ON DATABASE "{database}" TO "{name}";'
        f' GRANT USAGE ON SCHEMA "public" TO "{name}"'
    )
    obey(environment, line)
    assert can_read(environment)
    assert migrate(environment) == []
    assert can_read(environment)


def test_another_owners_table_that_cannot_be_read_is_reported(make_migrator: MakeMigrator) -> None:
    environment = make_migrator("CREATEROLE")
    name = environment["DB_USERNAME"]
    migrate(environment)
    execute_as_superuser(
        environment, f'ALTER TABLE {TABLE} OWNER TO postgres; REVOKE ALL ON {TABLE} FROM "{name}"'
    )
    line = refusal(environment)
    table = f'"public"."{TABLE}"'
    assert (
        line == f'role {name} cannot serve yet: {ADVICE}GRANT SELECT ON TABLE {table} TO "{name}"'
    )
    obey(environment, line)
    assert migrate(environment) == []
    assert can_read(environment)


# --- a serving role with further privileges


def test_a_superuser_is_never_altered(fresh: Environment) -> None:
    name, fresh = fresh["DB_USERNAME"], fresh | {"DB_PASSWORD": "as it was"}
    execute_as_superuser(fresh, f"CREATE ROLE \"{name}\" SUPERUSER LOGIN PASSWORD 'as it was'")
    before = f"SELECT * FROM pg_authid WHERE rolname = '{name}'"
    authid = rows(superuser(fresh), before)
    assert excess(superuser(fresh)) == [
        f"role {name} is a superuser and may do anything: choose another DB_USERNAME"
    ]
    assert rows(superuser(fresh), before) == authid
    assert can_read(fresh)


def test_a_role_that_owns_everything_is_reported_and_loses_nothing(
    make_migrator: MakeMigrator,
) -> None:
    """An operator may give the new role to DB_MIGRATION_USERNAME instead of DB_USERNAME."""
    old = make_migrator()
    migrator, database = old["DB_MIGRATION_USERNAME"], old["DB_NAME"]
    owner = with_role(old, migrator, "migrates")
    migrations.migrate(Settings.from_env(owner))
    swapped = superuser(owner)
    (notice,) = excess(swapped)
    assert notice == (
        f"role {migrator} owns database {database}, table public.{TABLE}, so it may do more"
        f" than read: choose another DB_USERNAME, or {ADVICE}"
        f'REASSIGN OWNED BY "{migrator}" TO "postgres"'
    )
    assert may(owner, ROW)
    obey(swapped, notice)
    assert migrate(swapped) == []
    assert can_read(swapped)
    assert not may(swapped, ROW)


def test_a_member_of_the_owning_role_is_reported(fresh: Environment) -> None:
    name, owner = fresh["DB_USERNAME"], fresh["DB_MIGRATION_USERNAME"]
    # The superuser creates it: a role that the owner created could not be its member.
    made = f'CREATE ROLE "{name}" LOGIN PASSWORD \'{fresh["DB_PASSWORD"]}\' IN ROLE "{owner}"'
    execute_as_superuser(fresh, made)
    unlimited = migrate(fresh)
    notice, *others = check_role(fresh)
    assert others == unlimited
    assert notice == (
        f"role {name} is a member of {owner}, so it may do more than read: {ADVICE}"
        f'REVOKE "{owner}" FROM "{name}"'
    )
    assert may(fresh, ROW)
    obey(fresh, notice)
    assert migrate(fresh) == unlimited
    assert not may(fresh, ROW)


@pytest.mark.parametrize("powerful", ["notifier", "another_superuser", "pg_execute_server_program"])
def test_a_member_of_a_powerful_role_is_reported(fresh: Environment, powerful: str) -> None:
    """The owner if another role migrates, a superuser, or a role that may run programs."""
    execute_as_superuser(fresh, f'CREATE ROLE "{fresh["DB_USERNAME"]}"')
    if powerful == "another_superuser":
        execute_as_superuser(fresh, f"CREATE ROLE {powerful} SUPERUSER")
    assert migrate(superuser(fresh)) == []
    execute_as_superuser(fresh, f'GRANT {powerful} TO "{fresh["DB_USERNAME"]}"')
    (notice,) = excess(superuser(fresh))
    assert f"is a member of {powerful}, so it may do more than read" in notice
    obey(fresh, notice)
    assert migrate(superuser(fresh)) == []


def test_a_role_with_attributes_is_reported(fresh: Environment) -> None:
    migrate(fresh)
    name = fresh["DB_USERNAME"]
    execute_as_superuser(fresh, f'ALTER ROLE "{name}" CREATEROLE CREATEDB REPLICATION BYPASSRLS')
    # Only a superuser may alter a role with REPLICATION.
    (notice,) = excess(superuser(fresh))
    assert notice == (
        f"role {name} has CREATEROLE, CREATEDB, REPLICATION, BYPASSRLS: {ADVICE}"
        f'ALTER ROLE "{name}" NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS'
    )
    obey(fresh, notice)
    assert migrate(fresh) == []


def test_privileges_that_every_role_has_are_reported(fresh: Environment) -> None:
    migrate(fresh)
    execute(fresh, f"GRANT UPDATE, INSERT ON {TABLE} TO PUBLIC")
    (notice,) = excess(fresh)
    assert notice == (
        f"every role has INSERT, UPDATE on table public.{TABLE}: {ADVICE}"
        f'REVOKE INSERT, UPDATE ON TABLE "public"."{TABLE}" FROM PUBLIC'
    )
    obey(fresh, notice)
    assert migrate(fresh) == []
    assert not may(fresh, ROW)


def test_privileges_through_membership_are_reported(fresh: Environment) -> None:
    migrate(fresh)
    name = fresh["DB_USERNAME"]
    execute_as_superuser(
        fresh, f'GRANT pg_monitor TO "{name}"; GRANT UPDATE, INSERT ON {TABLE} TO pg_monitor'
    )
    (notice,) = excess(fresh)
    assert notice == (
        f"role {name} has INSERT, UPDATE on table public.{TABLE}, granted by another role"
        " or to a role it is a member of: revoke that"
    )


def test_privileges_that_the_role_granted_to_others_do_not_stop_a_migration(
    fresh: Environment,
) -> None:
    migrate(fresh)
    execute(fresh, f'GRANT INSERT ON {TABLE} TO "{fresh["DB_USERNAME"]}" WITH GRANT OPTION')
    with serving(fresh) as connection:
        connection.execute(f"GRANT INSERT ON {TABLE} TO pg_monitor")
    (notice,) = excess(fresh)
    assert "has INSERT on table" in notice


# --- the command check-role


def test_a_role_that_does_not_exist_is_reported(database: Environment) -> None:
    stranger = with_role(database)
    assert check_role(stranger) == [
        f"role {stranger['DB_USERNAME']} does not exist: run flask --app notifier.app migrate"
    ]


def test_a_role_that_cannot_serve_is_reported_beside_its_further_privileges(
    fresh: Environment,
) -> None:
    migrate(fresh)
    name, table = fresh["DB_USERNAME"], f'"public"."{TABLE}"'
    statements = f'ALTER ROLE "{name}" NOLOGIN; REVOKE ALL ON {TABLE} FROM "{name}"'
    execute_as_superuser(fresh, f'{statements}; GRANT TRIGGER ON {TABLE} TO "{name}"')
    cannot_serve, can_more = check_role(fresh)
    assert cannot_serve == (
        f'role {name} cannot serve yet: {ADVICE}ALTER ROLE "{name}" LOGIN;'
        f' GRANT SELECT ON TABLE {table} TO "{name}"'
    )
    assert can_more.startswith(f"role {name} has TRIGGER on table public.{TABLE}")
    obey(fresh, cannot_serve)
    assert check_role(fresh) == [can_more]
    assert can_read(fresh)


def test_the_role_can_be_checked_without_the_migrating_role(migrated: Environment) -> None:
    """The service's own environment has no DB_MIGRATION_* variables."""
    serving_only = {key: value for key, value in migrated.items() if "MIGRATION" not in key}
    assert check_role(serving_only) == []


def test_one_role_that_migrates_and_serves_is_reported(database: Environment) -> None:
    owner = database["DB_MIGRATION_USERNAME"]
    both = with_role(database, owner, database["DB_MIGRATION_PASSWORD"])
    assert check_role(both)[0] == (
        f"role {owner} owns database {database['DB_NAME']}, table public.{TABLE},"
        " so it may do more than read: choose another DB_USERNAME"
    )


def test_a_check_before_the_first_migration_fails_with_one_line(fresh: Environment) -> None:
    result = run(fresh, "check-role")
    expected = f"Error: there is no table {TABLE}: run flask --app notifier.app migrate\n"
    assert (result.exit_code, result.output) == (1, expected)


def test_a_check_changes_nothing(fresh: Environment) -> None:
    migrate(fresh)
    execute(fresh, f'GRANT UPDATE ON {TABLE} TO "{fresh["DB_USERNAME"]}"')
    before = acls(fresh)
    assert len(check_role(fresh)) == 1
    assert acls(fresh) == before


# --- several migrations at once


def test_processes_that_migrate_several_databases_create_one_role_together(
    server: Environment, fresh: Environment
) -> None:
    name = fresh["DB_USERNAME"]
    databases = [with_role(create_database(server), name) for _ in range(3)]
    with ExitStack() as stack:
        running = [stack.enter_context(migrating(database)) for database in databases]
        ended = [(*process.communicate(timeout=60), process.returncode) for process in running]
    assert [(errors, status) for _, errors, status in ended] == [("", 0)] * len(running)
    for output, _, _ in ended:
        assert output.endswith("\n" + GRANTED.replace(SERVING, name))
    assert all(can_read(database) for database in databases)


@pytest.mark.parametrize("exists", [False, True])
def test_a_migration_waits_for_one_of_another_database_and_succeeds(
    fresh: Environment, server: Environment, exists: bool
) -> None:
    """The other migration's open transaction has created the role or changed its password."""
    name = fresh["DB_USERNAME"]
    if exists:
        migrate(fresh)
    verb = "ALTER" if exists else "CREATE"
    with connect(server) as other:
        other.execute("BEGIN")
        other.execute(f"{verb} ROLE \"{name}\" LOGIN PASSWORD 'overtaken'")
        with migrating(fresh) as process:
            eventually(lambda: waiting(fresh) == 1)
            assert rows(fresh, f"SELECT pg_try_advisory_lock({migrations.LOCK_KEY})") == [(False,)]
            other.execute("COMMIT")
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("\n" + GRANTED.replace(SERVING, name))
    assert can_read(fresh)


def test_waiting_too_long_for_another_databases_migration_is_reported_in_one_line(
    fresh: Environment, server: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_waits, "LOCK_WAIT", 0.4)
    with connect(server) as other:
        pid = other.info.backend_pid
        other.execute("BEGIN")
        other.execute(f'CREATE ROLE "{fresh["DB_USERNAME"]}"')
        result = run(fresh, "migrate")
        other.execute("ROLLBACK")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(
        f"Error: another lock that this needs has been held for 0.4s by process {pid} of role "
    )


def test_a_role_that_others_change_constantly_is_given_up(
    fresh: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "find_role", lambda *_: None)  # so that each try creates it again
    execute(fresh, f'CREATE ROLE "{fresh["DB_USERNAME"]}"')
    with pytest.raises(NotGranted, match="other sessions keep changing role"):
        migrate(fresh)
