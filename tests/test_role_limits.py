"""The limits of the serving role: its connections, the time of its statements, large objects."""

from contextlib import ExitStack

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege, QueryCanceled

from notifier.settings import Settings
from notifier.store import migrations
from notifier.store.db import Database
from tests.fixtures import Environment
from tests.test_migrations import execute, rows, run
from tests.test_roles import (
    ADVICE,
    check_role,
    execute_as_superuser,
    may,
    migrate,
    obey,
    serving,
    superuser,
    with_role,
)
from tests.timing import eventually

# One worker, so the limit is four connections.
SMALL = {"WEB_CONCURRENCY": "1", "WEB_INSTANCES": "1"}


@pytest.fixture
def fresh(empty_database: Environment) -> Environment:
    """A database that is not migrated, with a serving role that does not exist yet."""
    return with_role(empty_database)


def notices(environment: Environment) -> list[str]:
    """Migrate; return the notices after the line that the role may read."""
    return migrations.migrate(Settings.from_env(environment)).notices[1:]


def limit_of(environment: Environment) -> int:
    query = f"SELECT rolconnlimit FROM pg_roles WHERE rolname = '{environment['DB_USERNAME']}'"
    ((limit,),) = rows(environment, query)
    return int(limit)


def connections_of(environment: Environment) -> int:
    query = f"SELECT FROM pg_stat_activity WHERE usename = '{environment['DB_USERNAME']}'"
    return len(rows(environment, query))


# --- connections


@pytest.mark.parametrize(
    ("workers", "instances", "limit"), [("1", "1", 4), ("3", "2", 24), ("4", "", 80)]
)
def test_the_role_may_open_four_connections_for_each_worker(
    fresh: Environment, workers: str, instances: str, limit: int
) -> None:
    name = fresh["DB_USERNAME"]
    environment = fresh | {"WEB_CONCURRENCY": workers, "WEB_INSTANCES": instances}
    line = f"role {name} may open at most {limit} connections (4 * WEB_CONCURRENCY * WEB_INSTANCES)"
    for _ in range(2):
        assert notices(environment) == [line]
        assert limit_of(fresh) == limit
    assert check_role(environment) == []


def test_a_flood_of_connections_ends_at_the_limit(fresh: Environment) -> None:
    migrate(fresh)
    notices(fresh | SMALL)
    database = Database(Settings.from_env(fresh))
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(database.connect())
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            database.connect()


def test_a_limit_that_a_reload_of_the_running_workers_exceeds_is_not_set(
    fresh: Environment,
) -> None:
    """An operator of several instances may not know WEB_INSTANCES yet."""
    name = fresh["DB_USERNAME"]
    migrate(fresh)
    before = limit_of(fresh)
    with serving(fresh), serving(fresh), serving(fresh):
        # The connection that the migration read with may end a little later.
        eventually(lambda: connections_of(fresh) == 3)
        (line,) = notices(fresh | SMALL)
    assert line == (
        f"role {name} has 3 connections, and a reload needs up to 6, so its limit is not set to 4:"
        " set WEB_INSTANCES to the number of instances"
    )
    assert limit_of(fresh) == before


def test_a_missing_limit_is_reported_with_the_statement(fresh: Environment) -> None:
    migrate(fresh)
    name = fresh["DB_USERNAME"]
    execute_as_superuser(fresh, f'ALTER ROLE "{name}" CONNECTION LIMIT -1')
    (line,) = check_role(fresh | SMALL)
    assert line == (
        f'role {name} has no connection limit: {ADVICE}ALTER ROLE "{name}" CONNECTION LIMIT 4'
    )
    obey(fresh, line)
    assert check_role(fresh) == []


@pytest.mark.parametrize(("used", "limit", "mended"), [(0, 0, 4), (4, 4, 8)])
def test_a_limit_that_lets_the_role_not_log_in_is_reported_with_the_statement(
    fresh: Environment, used: int, limit: int, mended: int
) -> None:
    migrate(fresh)
    name = fresh["DB_USERNAME"]
    with ExitStack() as stack:
        eventually(lambda: connections_of(fresh) == 0)
        for _ in range(used):
            stack.enter_context(serving(fresh))
        execute_as_superuser(fresh, f'ALTER ROLE "{name}" CONNECTION LIMIT {limit}')
        (line,) = check_role(fresh | SMALL)
        assert f'too many connections for role "{name}": {ADVICE}' in line
        assert line.endswith(f'ALTER ROLE "{name}" CONNECTION LIMIT {mended}')
        obey(fresh, line)
        assert check_role(fresh | SMALL) == []


# --- statements


def test_a_statement_of_the_role_ends_after_ten_seconds(fresh: Environment) -> None:
    migrate(fresh)
    with serving(fresh) as connection:
        assert connection.execute("SHOW statement_timeout").fetchall() == [("10s",)]


@pytest.mark.parametrize("where", ["", "IN DATABASE {} "])
@pytest.mark.parametrize("set_to", ["RESET statement_timeout", "SET statement_timeout = 0"])
def test_a_missing_statement_timeout_is_reported_and_set(
    fresh: Environment, where: str, set_to: str
) -> None:
    migrate(fresh)
    name, database = fresh["DB_USERNAME"], fresh["DB_NAME"]
    execute_as_superuser(
        fresh,
        f'ALTER ROLE "{name}" IN DATABASE {database} RESET statement_timeout;'
        f'ALTER ROLE "{name}" {where.format(database)}{set_to}',
    )
    (line,) = check_role(fresh)
    assert line == (
        f'role {name} has no statement_timeout: {ADVICE}ALTER ROLE "{name}" IN DATABASE'
        f" \"{database}\" SET statement_timeout = '10s'"
    )
    assert migrate(fresh) == check_role(fresh) == []
    with serving(fresh) as connection:
        assert connection.execute("SHOW statement_timeout").fetchall() == [("10s",)]


def test_a_statement_timeout_of_the_role_in_all_databases_is_enough(fresh: Environment) -> None:
    migrate(fresh)
    name = f'"{fresh["DB_USERNAME"]}"'
    execute_as_superuser(
        fresh,
        f"ALTER ROLE {name} IN DATABASE {fresh['DB_NAME']} RESET ALL;"
        f"ALTER ROLE {name} SET statement_timeout = 200",
    )
    assert check_role(fresh) == []
    with serving(fresh) as connection, pytest.raises(QueryCanceled):
        connection.execute("SELECT pg_sleep(10)")


# --- large objects


STATEMENTS = [
    "SELECT lo_creat(-1)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_open(1, 131072)",
    "SELECT lowrite(0, 'x')",
    "SELECT lo_put(1, 0, 'x')",
    "SELECT lo_truncate64(0, 1)",
    "SELECT lo_unlink(1)",
    "SELECT lo_get(1)",
    "SELECT loread(0, 1)",
]
WRITES = STATEMENTS[:3]


@pytest.fixture
def opened(fresh: Environment) -> Environment:
    """A migrated database whose roles may store large objects, as in any new database."""
    assert migrate(fresh) == []
    functions = "lo_creat, lo_create, lo_from_bytea, lo_open, lowrite, lo_put, lo_truncate64"
    grant = f"GRANT EXECUTE ON FUNCTION {functions}, lo_unlink, lo_get(oid), loread TO PUBLIC"
    execute_as_superuser(fresh, grant)
    return fresh


def test_a_superuser_takes_large_objects_away(opened: Environment) -> None:
    assert all(may(opened, statement) for statement in WRITES)
    told = "roles other than superusers may no longer store large objects in this database"
    assert migrate(superuser(opened)) == [told]
    assert migrate(superuser(opened)) == check_role(opened) == []
    with serving(opened) as connection:
        for statement in STATEMENTS:
            with pytest.raises(InsufficientPrivilege):
                connection.execute(statement.encode())


def test_other_migrating_roles_give_the_statement_and_go_on(opened: Environment) -> None:
    (line,) = migrate(opened)
    name = opened["DB_USERNAME"]
    revoke = "REVOKE EXECUTE ON FUNCTION lo_creat(integer), "
    where = f"in database {opened['DB_NAME']}, "
    assert line.startswith(f"role {name} may store large objects: {where}{ADVICE}{revoke}")
    assert line.endswith(" FROM PUBLIC")
    assert check_role(opened) == [line]
    assert run(opened, "migrate").exit_code == 0
    obey(opened, line)
    assert migrate(opened) == check_role(opened) == []
    assert not any(may(opened, statement) for statement in STATEMENTS)


def test_large_objects_of_the_role_itself_keep_nothing_open(opened: Environment) -> None:
    with serving(opened) as connection:
        connection.execute("SELECT lo_from_bytea(0, repeat('x', 1000000)::bytea)")
    migrate(superuser(opened))
    assert check_role(opened) == []


def test_roles_that_have_large_objects_keep_their_functions(opened: Environment) -> None:
    """PostgreSQL grants these functions to every role of the database, not to one."""
    execute(opened, "SELECT lo_create(0)")
    name = opened["DB_USERNAME"]
    (line,) = migrate(superuser(opened))
    assert line.startswith(
        f"role {name} may store large objects, as other roles do:"
        f" in database {opened['DB_NAME']}, {ADVICE}REVOKE "
    )
    assert check_role(opened) == [line]
    execute(opened, "SELECT lo_create(0)")
    obey(opened, line)
    assert migrate(opened) == []


def test_a_grant_of_the_role_itself_is_revoked(opened: Environment) -> None:
    execute_as_superuser(
        opened, f'GRANT EXECUTE ON FUNCTION lo_create TO "{opened["DB_USERNAME"]}"'
    )
    migrate(superuser(opened))
    assert check_role(opened) == []
    assert not may(opened, WRITES[1])


@pytest.mark.parametrize("also", ["", ", PUBLIC"])
def test_a_grant_through_groups_names_the_groups(fresh: Environment, also: str) -> None:
    assert migrate(fresh) == []
    name = fresh["DB_USERNAME"]
    inner, outer = sorted([f"inner {name}", f"outer {name}"])
    execute_as_superuser(
        fresh,
        f'CREATE ROLE "{inner}"; CREATE ROLE "{outer}" ROLE "{inner}"; GRANT "{inner}" TO "{name}";'
        f'GRANT EXECUTE ON FUNCTION lo_create TO "{outer}"{also};'
        f'GRANT EXECUTE ON FUNCTION lo_put TO "{inner}", pg_monitor',
    )
    (line,) = migrate(fresh)
    functions = "lo_create(oid), lo_put(oid,bigint,bytea)"
    assert line.endswith(
        f'{ADVICE}REVOKE EXECUTE ON FUNCTION {functions} FROM "{inner}", "{outer}"{also}'
    )
    obey(fresh, line)
    assert migrate(fresh) == check_role(fresh) == []
    assert not any(may(fresh, statement) for statement in STATEMENTS)
