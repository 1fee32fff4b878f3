"""A migration says that the serving role may read only after that role has read the same rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from notifier.settings import Settings
from notifier.store import role_reading
from tests.fixtures import Environment
from tests.test_migrations import execute, rows, run
from tests.test_roles import (
    ADVICE,
    ROW,
    TABLE,
    can_read,
    check_role,
    execute_as_superuser,
    migrate,
    obey,
    refusal,
    serving,
    superuser,
    with_role,
)
from tests.timing import eventually

OWNER = "notifier"
ROWS = f"{ROW}, ('PushNotification', 'b', 'http://b/'), ('Email', 'c', 'http://c/')"


@pytest.fixture
def fresh(empty_database: Environment) -> Environment:
    """A database that is not migrated, with a serving role that does not exist yet."""
    return with_role(empty_database)


@pytest.fixture
def migrated(fresh: Environment) -> Environment:
    assert migrate(fresh) == []
    return fresh


def refused(environment: Environment) -> str:
    """Return the line with which `migrate` and `check-role` refuse; neither says "may read"."""
    line = refusal(environment)
    assert "may read" not in line
    assert check_role(environment) == [line]
    return line


def mend(environment: Environment, line: str) -> None:
    """Run the statement of a refusal; nothing may be left to refuse, now and the next time."""
    obey(environment, line)
    assert check_role(environment) == []
    for _ in range(2):
        assert migrate(environment) == []


def read(environment: Environment) -> list[tuple[Any, ...]]:
    """Return the rows that the serving role reads, by the plain name of the table."""
    with serving(environment) as connection:
        return connection.execute(
            f"SELECT provider_name FROM {TABLE} ORDER BY 1".encode()
        ).fetchall()


# --- the same table


def name_of(environment: Environment) -> str:
    return f'"{environment["DB_USERNAME"]}"'


def not_found(environment: Environment, schema: str, path: str) -> str:
    name = environment["DB_USERNAME"]
    return (
        f"role {name} does not find table {schema}.{TABLE}, because its search_path is {path}:"
        f' {ADVICE}ALTER ROLE "{name}" IN DATABASE "{environment["DB_NAME"]}"'
        f' SET search_path = "{schema}"'
    )


@pytest.mark.parametrize("decoy", ["", "public", "serving"])
def test_a_table_in_the_owners_own_schema_is_refused(fresh: Environment, decoy: str) -> None:
    """The default search_path begins with "$user", which is another schema for each role."""
    execute(fresh, f"CREATE SCHEMA {OWNER} AUTHORIZATION {OWNER}")
    run(fresh, "migrate")
    execute(fresh, ROWS)
    if decoy:
        schema = name_of(fresh) if decoy == "serving" else "public"
        execute_as_superuser(
            fresh,
            f"CREATE SCHEMA IF NOT EXISTS {schema}; GRANT USAGE ON SCHEMA {schema} TO PUBLIC;"
            f"CREATE TABLE {schema}.{TABLE} (LIKE {OWNER}.{TABLE});"
            f"GRANT SELECT ON {schema}.{TABLE} TO PUBLIC",
        )
    line = refused(fresh)
    assert line == not_found(fresh, OWNER, '"$user", public')
    mend(fresh, line)
    assert read(fresh) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("where", ["", "IN DATABASE {} "])
def test_a_search_path_of_the_role_is_refused(migrated: Environment, where: str) -> None:
    where = where.format(migrated["DB_NAME"])
    execute_as_superuser(
        migrated, f"ALTER ROLE {name_of(migrated)} {where}SET search_path = pg_catalog"
    )
    line = refused(migrated)
    assert line == not_found(migrated, "public", "pg_catalog")
    mend(migrated, line)


def test_a_search_path_of_the_database_is_refused(fresh: Environment) -> None:
    name = fresh["DB_NAME"]
    execute(fresh, f"CREATE SCHEMA other; ALTER DATABASE {name} SET search_path = other")
    execute_as_superuser(fresh, f"ALTER ROLE {OWNER} IN DATABASE {name} SET search_path = public")
    run(fresh, "migrate")
    line = refused(fresh)
    assert line == not_found(fresh, "public", "other")
    mend(fresh, line)


# --- the same rows


POLICY = f"CREATE POLICY ours ON {TABLE} "


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    ("policies", "hidden"),
    [
        ("", 3),
        (POLICY + "USING (provider_name <> 'b')", 1),
        (POLICY + "FOR SELECT TO pg_monitor USING (true)", 3),
        (POLICY + "FOR UPDATE USING (true)", 3),
        (POLICY + "AS RESTRICTIVE USING (true)", 3),
        (f"{POLICY}USING (true); CREATE POLICY no ON {TABLE} AS RESTRICTIVE USING (false)", 3),
    ],
)
def test_rows_that_row_level_security_hides_are_refused(
    migrated: Environment, policies: str, hidden: int, filled: bool
) -> None:
    """An empty table is refused too: its first rows would be hidden."""
    execute(migrated, f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; {policies}")
    if filled:
        execute(migrated, ROWS)
    line = refused(migrated)
    name, table = migrated["DB_USERNAME"], f"table public.{TABLE}"
    sees = f"sees {3 - hidden} of the 3 rows" if filled else "may not see all rows"
    assert line.startswith(
        f"role {name} {sees} of {table}, because of row-level security: {ADVICE}"
    )
    mend(migrated, line)
    execute(migrated, "" if filled else ROWS)
    assert read(migrated) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("policy", ["USING (true)", "FOR SELECT USING (true)"])
def test_a_policy_that_shows_all_rows_is_accepted(
    migrated: Environment, policy: str, filled: bool
) -> None:
    execute(migrated, f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; {POLICY} {policy}")
    execute(migrated, ROWS if filled else "")
    assert migrate(migrated) == check_role(migrated) == []


def test_a_policy_that_shows_all_rows_of_the_service_is_accepted(migrated: Environment) -> None:
    execute(migrated, f"{ROWS}; UPDATE {TABLE} SET deleted_at = now() WHERE provider_name = 'b'")
    execute(
        migrated,
        f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; {POLICY} USING (deleted_at IS NULL)",
    )
    assert migrate(migrated) == check_role(migrated) == []


def test_security_that_binds_the_owner_too_is_refused(migrated: Environment) -> None:
    """The owner does not see the hidden rows either, so they cannot be compared."""
    execute(
        migrated,
        f"{ROWS}; ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
        f"{POLICY} USING (provider_name <> 'b')",
    )
    mend(migrated, refused(migrated))
    assert read(migrated) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("setting", "usual", "words"),
    [
        ("row_security = off", "row_security = on", "row-level security policy"),
        ("role = pg_monitor", "role = none", "permission denied"),
    ],
)
def test_a_setting_that_makes_the_query_fail_is_refused(
    migrated: Environment, setting: str, usual: str, words: str
) -> None:
    name = migrated["DB_USERNAME"]
    execute(migrated, f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; {POLICY} USING (true)")
    execute_as_superuser(
        migrated, f'GRANT pg_monitor TO "{name}"; ALTER ROLE "{name}" SET {setting}'
    )
    line = refused(migrated)
    assert line.startswith(f"role {name} cannot run the service's query: PostgreSQL: ")
    assert words in line
    assert line.endswith(
        f': {ADVICE}ALTER ROLE "{name}" IN DATABASE "{migrated["DB_NAME"]}" SET {usual}'
    )
    mend(migrated, line)


def test_a_view_that_shows_each_role_other_rows_is_refused(migrated: Environment) -> None:
    execute(
        migrated,
        f"{ROWS}; ALTER TABLE {TABLE} RENAME TO all_of_them; CREATE VIEW {TABLE} AS"
        f" SELECT * FROM all_of_them WHERE session_user = '{OWNER}' OR provider_name <> 'b';"
        " DELETE FROM _yoyo_migration WHERE false",
    )
    name = migrated["DB_USERNAME"]
    line = f"role {name} sees 2 of the 3 rows of table public.{TABLE}"
    assert refused(migrated) == line


def test_a_partitioned_table_is_accepted(migrated: Environment) -> None:
    execute(
        migrated,
        f"{ROWS}; ALTER TABLE {TABLE} RENAME TO part; CREATE TABLE {TABLE} (LIKE part)"
        f" PARTITION BY LIST (provider_type); ALTER TABLE {TABLE} ATTACH PARTITION part DEFAULT",
    )
    assert migrate(migrated) == check_role(migrated) == []
    assert read(migrated) == [("a",), ("b",), ("c",)]


def test_a_change_between_both_readings_is_no_alarm(
    migrated: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(migrated, ROWS)
    snapshot = role_reading._snapshot

    @contextmanager
    def after_a_change(*arguments: Any) -> Iterator[None]:
        execute(migrated, f"DELETE FROM {TABLE}")
        with snapshot(*arguments):
            yield

    monkeypatch.setattr(role_reading, "_snapshot", after_a_change)
    assert migrate(migrated) == []
    assert rows(migrated, f"SELECT FROM {TABLE}") == []


# --- the login


def test_a_role_that_pg_hba_rejects_is_refused(migrated: Environment) -> None:
    name, database = migrated["DB_USERNAME"], migrated["DB_NAME"]
    ((file,),) = rows(superuser(migrated), "SHOW hba_file")
    hba, before = Path(file), Path(file).read_text()
    try:
        hba.write_text(f'host "{database}" "{name}" all reject\n{before}')
        execute_as_superuser(migrated, "SELECT pg_reload_conf()")
        eventually(lambda: check_role(migrated))
        line = refused(migrated)
    finally:
        hba.write_text(before)
        execute_as_superuser(migrated, "SELECT pg_reload_conf()")
    eventually(lambda: not check_role(migrated))
    assert line.startswith(f"role {name} cannot log in, so the service cannot either: ")
    assert "pg_hba.conf rejects connection" in line
    assert migrate(migrated) == []


def test_settings_of_the_role_that_do_no_harm_are_accepted(migrated: Environment) -> None:
    name = name_of(migrated)
    execute(migrated, ROWS)
    execute_as_superuser(
        migrated,
        f"ALTER ROLE {name} SET default_transaction_read_only = on;"
        f"ALTER ROLE {name} SET default_transaction_isolation = serializable;"
        f"ALTER ROLE {name} SET client_encoding = latin1",
    )
    assert migrate(migrated) == []


def test_the_statement_is_given_once_if_privileges_are_lacking_too(migrated: Environment) -> None:
    """Without its privileges the role could not read anyway, so reading is not tried."""
    execute(migrated, f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY")
    execute_as_superuser(migrated, f"REVOKE SELECT ON {TABLE} FROM {name_of(migrated)}")
    (line,) = check_role(migrated)
    assert "GRANT SELECT" in line
    assert "row-level security" in refusal(migrated)


def test_the_settings_of_the_service_decide_where_the_role_logs_in(migrated: Environment) -> None:
    """The place for LISTEN is the migration's own; DB_HOST may be a pooler."""
    elsewhere = migrated | {"DB_HOST": "does-not-exist.invalid", "DB_PORT": "1"}
    place = {"DB_LISTEN_HOST": migrated["DB_HOST"], "DB_LISTEN_PORT": migrated["DB_PORT"]}
    assert migrate(elsewhere | place) == []
    assert can_read(migrated)
    assert Settings.from_env(elsewhere | place).serve_place[0] != migrated["DB_HOST"]
