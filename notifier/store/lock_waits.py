"""Bounds how long migrations wait for locks, and names the sessions that hold these locks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable

from notifier.errors import Refused
from notifier.single_flight import start
from notifier.store.db import Connection, Database
from notifier.store.serving_role import by_administrator, quoted

# Seconds that a migration waits for a lock.
LOCK_WAIT = 60.0

# PostgreSQL knows the holders of a lock only while somebody waits for it.
_LOOKS = 20

# The sessions at the head of the queue before `pids`: those that wait for a lock are not to blame.
_HOLDERS = """
    WITH RECURSIVE ahead(pid) AS (
        SELECT unnest(pg_blocking_pids(pid)) FROM unnest(%s::int[]) AS pid
         UNION
        SELECT unnest(pg_blocking_pids(pid)) FROM ahead
    )
    SELECT pid, coalesce(usename, backend_type), application_name
      FROM ahead JOIN pg_stat_activity USING (pid)
     WHERE cardinality(pg_blocking_pids(pid)) = 0
     ORDER BY pid
"""


class LockWaits:
    """Opens connections that wait for no lock longer than `LOCK_WAIT`.

    A thread looks for sessions that block them, over a connection of its own, and remembers the
    last that it found. Shared between threads: `_pids` and `_holders`, of which one only appends
    and the other only assigns.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pids: list[int] = []
        self._holders: list[tuple[Any, ...]] = []

    def connect(self) -> Connection:
        connection = self._database.connect()
        connection.execute("SELECT set_config('lock_timeout', %s, false)", (f"{LOCK_WAIT}s",))
        self._pids.append(connection.info.backend_pid)
        return connection

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look for sessions that block the connections, during the block."""
        ended = threading.Event()
        with self._database.connect() as connection:
            watch = threading.Thread(target=self._watch, args=(connection, ended), daemon=True)
            start(watch)
            try:
                yield
            finally:
                ended.set()
                watch.join()

    def _watch(self, connection: Connection, ended: threading.Event) -> None:
        while not ended.wait(LOCK_WAIT / _LOOKS):
            try:
                found = connection.execute(_HOLDERS, (self._pids,)).fetchall()
            except psycopg.Error:
                return
            self._holders = found or self._holders

    @contextmanager
    def explained(self, lock: str) -> Iterator[None]:
        """Convert the error of too long a wait to a line that names the holders of `lock`.

        Raises:
            Refused: the wait took longer than `LOCK_WAIT`.
        """
        self._holders = []
        try:
            yield
        except LockNotAvailable:
            raise Refused(self._line(lock)) from None

    def _line(self, lock: str) -> str:
        if not self._holders:  # behind a pooler, or a prepared transaction
            return f"{lock} has been held for {LOCK_WAIT:g}s by an unknown session; try again"
        names = ", ".join(
            f"process {pid} of role {role} ({quoted(name)})" for pid, role, name in self._holders
        )
        ends = "; ".join(f"SELECT pg_terminate_backend({pid})" for pid, *_ in self._holders)
        return (
            f"{lock} has been held for {LOCK_WAIT:g}s by {names}: try again when that has finished;"
            f" if it is not a migration, {by_administrator(ends)}"
        )
