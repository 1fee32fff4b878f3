"""Operators' view of `notification_preferences`: list, add, edit, remove, restore."""

import re
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


# As bounded texts, because an operator may have made the table.
_OTHERS = ", ".join(f"left({name}::text, 100)" for name in ("priority", "created_at", "deleted_at"))

_READ = f"""
    SELECT {rows.SELECTED}, coalesce(octet_length(secret_key::text), 0) > 0,
           CASE WHEN deleted_at IS NULL THEN 'active' ELSE 'removed' END, {_OTHERS}
      FROM notification_preferences
     WHERE (%(id)s::text IS NULL OR id::text = %(id)s::text)
       AND (%(channel)s::text IS NULL OR provider_type::text = %(channel)s)
       AND (deleted_at IS NULL OR NOT %(active)s)
     ORDER BY provider_type, deleted_at IS NOT NULL, priority, id
"""  # noqa: S608 only constants

# PostgreSQL's text of a time in UTC. Python's `datetime` cannot hold all of them.
_TIME = re.compile(r"(\d{4,}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.\d+)?\+00( BC)?")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row without its secret; times are RFC 3339 in UTC, `state` is `active` or `removed`.

    `host` is the URL from the column of that name, with user info masked. `problem` names the
    column for which the service skips the row. A text that is too long is None. In a table that an
    operator has made, an id or a priority that is no integer, and a time that is none, are texts.
    """

    id: int | str | None
    channel: str | None
    name: str | None
    host: str | None
    priority: int | str | None
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
        Refused: there is no such row, there are several, or the service cannot use it.
    """
    with _reading(database) as connection:
        row = _one(connection, entry_id)
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
        if entry_id is None:  # in a table that an operator has made
            raise Refused("the column id has no default, so a new row would have no id")
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
    update = sql.SQL("UPDATE notification_preferences SET {} WHERE id::text = %(id)s::text").format(
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
            "UPDATE notification_preferences SET deleted_at = now() WHERE id::text = %s::text",
            (entry_id,),
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
            "UPDATE notification_preferences SET deleted_at = NULL WHERE id::text = %s::text",
            (entry_id,),
        )
        return _entry(connection, entry_id)


@contextmanager
def _reading(database: Database, *privileges: str) -> Iterator[Connection]:
    """Yield a connection in a transaction, after checking SELECT and `privileges`."""
    try:
        with database.connect() as connection, transaction(connection, COMMAND_WAIT):
            connection.execute(
                "SELECT set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true)"
            )
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
    entry_id: int | str | None = None,
    channel: str | None = None,
    active: bool = False,
) -> list[_Row]:
    """Return rows of the values of `rows.SELECTED` and of the other columns of `_READ`."""
    parameters = {"id": entry_id, "channel": channel, "active": active}
    return connection.execute(_READ, parameters).fetchall()


def _one(connection: Connection, entry_id: int | str) -> _Row:
    found = _rows(connection, entry_id=entry_id)
    if not found:
        raise Refused(f"there is no provider {entry_id}")
    if len(found) > 1:
        raise Refused(f"{len(found)} rows have the id {entry_id}: give each its own id with SQL")
    return found[0]


def _entry(connection: Connection, entry_id: int | str) -> Entry:
    return _shown(_one(connection, entry_id))


def _provider(row: _Row) -> Provider:
    return rows.provider(row[: rows.WIDTH])


def _shown(row: _Row) -> Entry:
    entry_id, channel, name, url, *_ = map(_printable, row[: rows.WIDTH])
    has_secret, state, priority, *times = row[rows.WIDTH :]
    host = None if url is None else USER_INFO.sub(r"\1***@", url)
    problem = None
    try:
        _provider(row)
    except Unusable as error:
        problem = str(error)
    created_at, deleted_at = map(_time, times)
    return Entry(
        *(rows.integer(entry_id), channel, name, host, rows.integer(_printable(priority))),
        *(has_secret, created_at, deleted_at, state, problem),
    )


def _time(text: str | None) -> str | None:
    """Return a time as RFC 3339; None for infinity. A text that is no time stays."""
    if text in ("infinity", "-infinity"):
        return None
    return text and _TIME.sub(r"\1T\2Z\3", _printable(text) or "")


def _printable(text: str | None) -> str | None:
    """Return the text, with an escape (`\\xe9`) for each byte that is no text."""
    if text is None:
        return None
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _place_of(connection: Connection, entry_id: int) -> tuple[str, str, bool]:
    """Return the channel and the URL of a row, empty if too long, and whether it is active."""
    row = _one(connection, entry_id)
    _, channel, _, url, *_ = row
    return channel or "", url or "", _shown(row).state == "active"


def _check_unique(
    connection: Connection, channel: str, url: str, own_id: int | None = None
) -> None:
    for other, _, _, its_url, *_ in _rows(connection, channel=channel, active=True):
        if rows.integer(other) != own_id and its_url is not None and same_place(its_url, url):
            raise Refused(f"provider {other} is active and has the same channel and URL")
