"""Operators' view of `notification_preferences`: list, add, edit, remove, restore."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from notifier.errors import Refused
from notifier.models import Provider
from notifier.store.db import COMMAND_WAIT, NO_TABLE, Connection, Database, transaction
from notifier.store.values import USER_INFO, Values, check_channel, check_url, checked, same_place

# How long to wait for the lock: another operator may have left a transaction open.
LOCK_WAIT = "5s"

# PostgreSQL formats the times, because Python cannot represent all of them.
_READ = """
    SELECT id, provider_type::text, provider_name, host, priority,
           coalesce(secret_key, '') <> '',
           to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
           to_char(deleted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
           CASE WHEN deleted_at IS NULL THEN 'active' ELSE 'removed' END
      FROM notification_preferences
     WHERE (%(id)s::numeric IS NULL OR id = %(id)s)
       AND (%(channel)s::text IS NULL OR provider_type::text = %(channel)s)
       AND (deleted_at IS NULL OR NOT %(active)s)
     ORDER BY provider_type, deleted_at IS NOT NULL, priority, id
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row without its secret; times are RFC 3339 in UTC, `state` is `active` or `removed`.

    `host` is the URL from the column of that name, with user info masked.
    """

    id: int
    channel: str
    name: str
    host: str
    priority: int | None
    has_secret: bool
    created_at: str | None
    deleted_at: str | None
    state: str


def entries(database: Database, *, channel: str | None = None, active: bool = False) -> list[Entry]:
    """Return the rows by channel: active rows in the order they are tried, then removed rows.

    All functions below raise the same errors.

    Args:
        channel: only rows of this channel.
        active: only active rows.

    Raises:
        Refused: the table does not exist, or the role lacks a privilege on it.
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    with _reading(database) as connection:
        return _read(connection, channel=channel, active=active)


def provider(database: Database, entry_id: int) -> tuple[Entry, Provider]:
    """Return a row, even a removed one, and its provider including the secret.

    Raises:
        Refused: there is no such row, or its channel is unknown.
    """
    with _reading(database) as connection:
        entry = _entry(connection, entry_id)
        [row] = connection.execute(
            "SELECT id, provider_type::text, provider_name, host, secret_key"
            " FROM notification_preferences WHERE id = %s",
            (entry_id,),
        ).fetchall()
    check_channel(entry.channel)
    return entry, Provider.from_row(row)


def add(database: Database, values: Values) -> Entry:
    """Add a row; only `priority` and `secret_key` may be missing from `values`.

    Raises:
        Refused: a value is invalid, or an active row has the same channel and URL.
    """
    columns = checked(values)
    insert = sql.SQL("INSERT INTO notification_preferences ({}) VALUES ({}) RETURNING id").format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(map(sql.Placeholder, columns)),
    )
    with _changing(database, "INSERT") as connection:
        _check_unique(connection, columns["provider_type"], columns["host"])
        [(entry_id,)] = connection.execute(insert, columns).fetchall()
        return _entry(connection, entry_id)


def edit(database: Database, entry_id: int, values: Values) -> Entry:
    """Change the given columns of a row, even of a removed one.

    Raises:
        Refused: there is no such row, no column is given, a value is invalid, or an active row has
            the same channel and URL.
    """
    columns = checked(values)
    if not columns:
        raise Refused("nothing to change: give at least one value")
    update = sql.SQL("UPDATE notification_preferences SET {} WHERE id = %(id)s").format(
        sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name))
            for name in columns
        )
    )
    with _changing(database) as connection:
        channel, url, is_active = _place_of(connection, entry_id)
        if is_active and columns.keys() & {"provider_type", "host"}:
            place = {"provider_type": channel, "host": url} | columns
            _check_unique(connection, place["provider_type"], place["host"], entry_id)
        connection.execute(update, columns | {"id": entry_id})
        return _entry(connection, entry_id)


def remove(database: Database, entry_id: int) -> Entry:
    """Mark a row as removed; it can be restored.

    Raises:
        Refused: there is no such row, or it is already removed.
    """
    with _changing(database) as connection:
        _, _, is_active = _place_of(connection, entry_id)
        if not is_active:
            raise Refused(f"provider {entry_id} is already removed")
        connection.execute(
            "UPDATE notification_preferences SET deleted_at = now() WHERE id = %s", (entry_id,)
        )
        return _entry(connection, entry_id)


def restore(database: Database, entry_id: int) -> Entry:
    """Make a removed row active again.

    Raises:
        Refused: there is no such row, it is not removed, its URL cannot be called, or an active row
            has the same channel and URL.
    """
    with _changing(database) as connection:
        channel, url, is_active = _place_of(connection, entry_id)
        if is_active:
            raise Refused(f"provider {entry_id} is not removed")
        check_url(url.strip())
        _check_unique(connection, channel, url, entry_id)
        connection.execute(
            "UPDATE notification_preferences SET deleted_at = NULL WHERE id = %s", (entry_id,)
        )
        return _entry(connection, entry_id)


@contextmanager
def _reading(database: Database, *privileges: str) -> Iterator[Connection]:
    """Yield a connection in a transaction, after checking SELECT and `privileges`."""
    try:
        with database.connect() as connection, transaction(connection, COMMAND_WAIT):
            _check_privileges(connection, database.username, ["SELECT", *privileges])
            yield connection
    except psycopg.errors.UndefinedTable:
        raise Refused(NO_TABLE) from None


@contextmanager
def _changing(database: Database, *privileges: str) -> Iterator[Connection]:
    """Yield a connection in a transaction that excludes concurrent changes of the table."""
    # LOCK TABLE needs UPDATE too.
    with _reading(database, *privileges, "UPDATE") as connection:
        connection.execute("SELECT set_config('lock_timeout', %s, true)", (LOCK_WAIT,))
        try:
            connection.execute("LOCK TABLE notification_preferences IN SHARE ROW EXCLUSIVE MODE")
        except psycopg.errors.LockNotAvailable:
            raise Refused(
                f"another change of the providers has been running for {LOCK_WAIT}; try again later"
            ) from None
        yield connection


def _check_privileges(connection: Connection, role: str, wanted: list[str]) -> None:
    """Raise `Refused` with the missing privileges, which PostgreSQL's own error does not name."""
    rows = connection.execute(
        "SELECT wanted FROM unnest(%s::text[]) wanted"
        " WHERE NOT has_table_privilege('notification_preferences', wanted)",
        (wanted,),
    ).fetchall()
    if rows:
        lacking = " and ".join(privilege for (privilege,) in rows)
        raise Refused(
            f"{role} lacks {lacking} on notification_preferences: set DB_MIGRATION_USERNAME"
            " and DB_MIGRATION_PASSWORD to the role that owns it"
        )


def _read(
    connection: Connection,
    *,
    entry_id: int | None = None,
    channel: str | None = None,
    active: bool = False,
) -> list[Entry]:
    rows = connection.execute(_READ, {"id": entry_id, "channel": channel, "active": active})
    return [
        Entry(row_id, its_channel, name, USER_INFO.sub(r"\1***@", url), *rest)
        for row_id, its_channel, name, url, *rest in rows
    ]


def _entry(connection: Connection, entry_id: int) -> Entry:
    found = _read(connection, entry_id=entry_id)
    if not found:
        raise _unknown(entry_id)
    return found[0]


def _place_of(connection: Connection, entry_id: int) -> tuple[str, str, bool]:
    """Return the channel and the URL of a row, and whether it is active."""
    row = connection.execute(
        "SELECT provider_type::text, host, deleted_at IS NULL"
        " FROM notification_preferences WHERE id = %s",
        (entry_id,),
    ).fetchone()
    if row is None:
        raise _unknown(entry_id)
    channel, url, is_active = row
    return channel, url, is_active


def _unknown(entry_id: int) -> Refused:
    return Refused(f"there is no provider {entry_id}")


def _check_unique(
    connection: Connection, channel: str, url: str, own_id: int | None = None
) -> None:
    rows = connection.execute(
        "SELECT id, host FROM notification_preferences WHERE provider_type::text = %s"
        " AND deleted_at IS NULL AND id IS DISTINCT FROM %s::bigint",
        (channel, own_id),
    )
    for other, its_url in rows:
        if same_place(its_url, url):
            raise Refused(f"provider {other} is active and has the same channel and URL")
