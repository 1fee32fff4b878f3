"""Proves that the serving role reads the providers: runs the service's query as that role."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psycopg

from notifier.settings import Settings
from notifier.store import role_limits
from notifier.store.db import (
    COMMAND_WAIT,
    GRACE,
    Connection,
    Database,
    bounded,
    first_line,
    transaction,
)
from notifier.store.preferences import QUERY
from notifier.store.serving_role import (
    TABLE,
    Object,
    Role,
    by_administrator,
    find_objects,
    quoted,
    value,
)

# Which table the name in the service's query means to a session.
_TABLE = "SELECT to_regclass(%s)::oid"

_IDS = f"SELECT ARRAY(SELECT id FROM ({QUERY}) AS service (id))"  # noqa: S608 no input is part of it

# One statement, so both come from the same snapshot.
_SNAPSHOT_AND_IDS = f"SELECT pg_export_snapshot(), ({_IDS})"

# Two flags: a permissive policy shows the session all rows; a restrictive policy may hide rows.
# Other conditions cannot be evaluated.
_POLICIES = """
    SELECT coalesce(bool_or(all_rows) FILTER (WHERE polpermissive), false),
           coalesce(bool_or(NOT all_rows) FILTER (WHERE NOT polpermissive), false)
      FROM (SELECT polpermissive, pg_get_expr(polqual, polrelid) = 'true' AS all_rows
              FROM pg_policy
             WHERE polrelid = %s::oid AND polcmd IN ('r', '*')
               AND EXISTS (SELECT FROM unnest(polroles) AS its
                            WHERE CASE its WHEN 0 THEN true
                                           ELSE pg_has_role(its, 'USAGE') END)) AS policies
"""

# Settings of role or database that make the query fail, unless they have these values.
_USUAL = {"role": "none", "row_security": "on"}


class _Read(NamedTuple):
    """What the owner finds, in the transaction that exported `snapshot`."""

    table: Object
    secured: bool  # by row-level security, so perhaps not all rows
    snapshot: str
    ids: set[str]


def problems(owner: Connection, role: Role, settings: Settings) -> list[str]:
    """Return a line with the remedy if the service would not read what `owner` reads.

    The role logs in as the service does. Nothing else shows pg_hba.conf, the password, and the
    settings of role and database.

    Args:
        owner: a connection outside any transaction; if it uses the role, there is nothing to check.

    Raises:
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    if value(owner, "SELECT %s::name = session_user", role.name):
        return []
    try:
        serving = Database.listening(settings).connect()
    except psycopg.Error as error:
        return [_login_failed(owner, role, settings, error)]
    with serving, transaction(owner, COMMAND_WAIT):
        read = _read(owner)
        try:
            with _snapshot(serving, read.snapshot):
                problem = _problem(serving, role, read)
        except psycopg.Error as error:
            problem = _query_failed(serving, role, error)
    return [problem] if problem else []


def _login_failed(owner: Connection, role: Role, settings: Settings, error: psycopg.Error) -> str:
    """Return a line with PostgreSQL's words, which may span several lines if there are hosts."""
    words = " ".join(str(error).split())
    line = f"role {role.name} cannot log in, so the service cannot either: {words}"
    if "too many connections for role" in words:
        return f"{line}: {by_administrator(role_limits.more_connections(owner, role, settings))}"
    if "authentication failed" in words:
        by_hand = "VALID UNTIL 'infinity'" if role.expired else "LOGIN PASSWORD '...'"
        return f"{line}: {by_administrator(f'ALTER ROLE {role} {by_hand}')}"
    return line


def _read(owner: Connection) -> _Read:
    (table,) = [obj for obj in find_objects(owner) if obj.kind == "TABLE"]
    if value(owner, "SELECT has_table_privilege(%s::oid, 'SELECT')", table.oid):
        ((snapshot, ids),) = owner.execute(_SNAPSHOT_AND_IDS.encode())
    else:  # another role owns the table
        snapshot, ids = value(owner, "SELECT pg_export_snapshot()"), []
    return _Read(table, _secured(owner, table), snapshot, set(ids))


@contextmanager
def _snapshot(connection: Connection, snapshot: str) -> Iterator[None]:
    """Run the block in a transaction that sees the rows of another transaction's snapshot."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    # Not `transaction`: no query may come before the snapshot.
    with bounded(connection, COMMAND_WAIT + GRACE), connection.transaction():
        connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'".encode())
        connection.execute(f"SET LOCAL statement_timeout = '{COMMAND_WAIT:g}s'".encode())
        yield


def _problem(serving: Connection, role: Role, read: _Read) -> str | None:
    if value(serving, _TABLE, TABLE) != read.table.oid:
        return _not_found(serving, role, read.table)
    secured = _secured(serving, read.table)
    if secured and (read.secured or not read.ids):  # no rows to compare
        shown, hidden = _policies(serving, read.table)
        if hidden or not shown:
            return _rows_hidden(
                serving, role, read.table, f"may not see all rows of {read.table.plain}"
            )
    ids = set(value(serving, _IDS))
    seen = read.ids & ids
    if seen == read.ids:
        return None
    sees = f"sees {len(seen)} of the {len(read.ids)} rows of {read.table.plain}"
    return _rows_hidden(serving, role, read.table, sees) if secured else f"role {role.name} {sees}"


def _query_failed(serving: Connection, role: Role, error: psycopg.Error) -> str:
    line = f"role {role.name} cannot run the service's query: {first_line(error)}"
    wrong = [
        _set(serving, role, f"{name} = {usual}")
        for name, usual in _USUAL.items()
        if value(serving, "SELECT current_setting(%s)", name) != usual
    ]
    return f"{line}: {by_administrator(*wrong)}" if wrong else line


def _not_found(serving: Connection, role: Role, table: Object) -> str:
    path = value(serving, "SELECT current_setting('search_path')")
    remedy = by_administrator(_set(serving, role, f"search_path = {quoted(*table.path[:1])}"))
    return (
        f"role {role.name} does not find {table.plain}, because its search_path is {path}: {remedy}"
    )


def _set(serving: Connection, role: Role, setting: str) -> str:
    """Return the statement for the role's setting in this database, which overrides all others."""
    database = quoted(value(serving, "SELECT current_database()"))
    return f"ALTER ROLE {role} IN DATABASE {database} SET {setting}"


def _rows_hidden(serving: Connection, role: Role, table: Object, sees: str) -> str:
    policy, name = quoted(f"{role.name} reads"), quoted(*table.path)
    statement = f"CREATE POLICY {policy} ON {name} FOR SELECT TO {role} USING (true)"
    _, restricted = _policies(serving, table)
    if restricted:  # no further policy shows the rows that it hides
        statement = f"ALTER {table} DISABLE ROW LEVEL SECURITY"
    return f"role {role.name} {sees}, because of row-level security: {by_administrator(statement)}"


def _policies(connection: Connection, table: Object) -> tuple[bool, bool]:
    ((shown, hidden),) = connection.execute(_POLICIES, (table.oid,))
    return shown, hidden


def _secured(connection: Connection, table: Object) -> bool:
    return bool(value(connection, "SELECT row_security_active(%s::oid)", table.oid))
