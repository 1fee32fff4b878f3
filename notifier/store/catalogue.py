"""Operators' view of `notification_preferences`: list, add, edit, remove, restore."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from notifier.errors import Refused
from notifier.models import Provider, Unusable
from notifier.store import rows
from notifier.store.db import COMMAND_WAIT, NO_TABLE, Connection, Database, transaction
from notifier.store.values import USER_INFO, Values, check_url, checked, same_place

_Row = tuple[Any, ...]

# How long to wait for the lock: another operator may have left a transaction open.
LOCK_WAIT = "5s"


def _time(column: str) -> str:
    """Return SQL that formats a time: Python cannot represent all of them."""
    return f"""to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
               || CASE WHEN {column} < '0001-01-01Z' THEN ' BC' ELSE '' END"""


_READ = f"""
    SELECT {rows.SELECTED}, priority, coalesce(octet_length(secret_key), 0) > 0,
           {_time("created_at")}, {_time("deleted_at")},
           CASE WHEN deleted_at IS NULL THEN 'active' ELSE 'removed' END
      FROM notification_preferences
     WHERE (%(id)s::numeric IS NULL OR id = %(id)s)
       AND (%(channel)s::text IS NULL OR provider_type::text = %(channel)s)
       AND (deleted_at IS NULL OR NOT %(active)s)
     ORDER BY provider_type, deleted_at IS NOT NULL, priority, id
"""  # noqa: S608 only constants


@dataclass(frozen=True, slots=True)
class Entry:
    """A row without its secret; times are RFC 3339 in UTC, `state` is `active` or `removed`.

    `host` is the URL from the column of that name, with user info masked. `problem` names the
    column for which the service skips the row. A text that is too long is None.
    """

    id: int
    channel: str | None
    name: str | None
    host: str | None
    priority: int | None
    has_secret: bool
    created_at: str | None
    deleted_at: str | None
    state: str
    problem: str | None


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
        return [*map(_shown, _rows(connection, channel=channel, active=active))]


def provider(database: Database, entry_id: int) -> tuple[Entry, Provider]:
    """Return a row, even a removed one, and its provider including the secret.

    Raises:
        Refused: there is no such row, or the service cannot use it.
    """
    with _reading(database) as connection:
        found = _rows(connection, entry_id=entry_id)
    if not found:
        raise _unknown(entry_id)
    [row] = found
    try:
        return _shown(row), _provider(row)
    except Unusable as error:
        raise Refused(f"provider {entry_id} cannot be used: {error}") from None


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
    except UnicodeEncodeError:
        raise Refused("the encoding of the database lacks a character of a value") from None


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


def _rows(
    connection: Connection,
    *,
    entry_id: int | None = None,
    channel: str | None = None,
    active: bool = False,
) -> list[_Row]:
    """Return rows of the values of `rows.SELECTED` and of the other columns of `_READ`."""
    parameters = {"id": entry_id, "channel": channel, "active": active}
    return connection.execute(_READ, parameters).fetchall()


def _entry(connection: Connection, entry_id: int) -> Entry:
    found = _rows(connection, entry_id=entry_id)
    if not found:
        raise _unknown(entry_id)
    return _shown(found[0])


def _provider(row: _Row) -> Provider:
    return rows.provider(row[: rows.WIDTH])


def _shown(row: _Row) -> Entry:
    entry_id, *texts, _, _ = row[: rows.WIDTH]
    channel, name, url = map(_printable, texts)
    host = None if url is None else USER_INFO.sub(r"\1***@", url)
    problem = None
    try:
        _provider(row)
    except Unusable as error:
        problem = str(error)
    return Entry(*(entry_id, channel, name, host, *row[rows.WIDTH :], problem))


def _printable(text: str | None) -> str | None:
    """Return the text, with an escape (`\\xe9`) for each byte that is no text."""
    if text is None:
        return None
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _place_of(connection: Connection, entry_id: int) -> tuple[str, str, bool]:
    """Return the channel and the URL of a row, empty if too long, and whether it is active."""
    found = _rows(connection, entry_id=entry_id)
    if not found:
        raise _unknown(entry_id)
    _, channel, _, url, *_ = found[0]
    return channel or "", url or "", _shown(found[0]).state == "active"


def _unknown(entry_id: int) -> Refused:
    return Refused(f"there is no provider {entry_id}")


def _check_unique(
    connection: Connection, channel: str, url: str, own_id: int | None = None
) -> None:
    for other, _, _, its_url, *_ in _rows(connection, channel=channel, active=True):
        if other != own_id and its_url is not None and same_place(its_url, url):
            raise Refused(f"provider {other} is active and has the same channel and URL")
