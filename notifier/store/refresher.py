"""Reloads a worker's preferences: after a change, before they expire, and after an outage."""

import logging
import math
import random
import select
import socket
import threading
import time
import uuid
from contextlib import ExitStack
from typing import LiteralString

import psycopg
from psycopg.pq import PGnotify

from notifier import metrics
from notifier.store.db import DATABASE_WAIT, Connection, Database, bounded, host_of, log_fields
from notifier.store.preferences import CHANGES, Preferences

PROBES: LiteralString = "notification_preferences_probe"

# Minimum seconds between reloads during a burst of changes.
SPACING = 0.02

# An idle connection is probed after this many seconds and then has DATABASE_WAIT to answer.
HEARTBEAT = 10.0

# Seconds between reloads while a channel has no provider and no connection listens for changes:
# until then the channel cannot deliver.
LACKING = 1.0

# Seconds of backoff: after the first failure, and the maximum.
SHORTEST_PAUSE, LONGEST_PAUSE = 0.5, 30.0

PROBE_WAIT = 1.0  # shorter than DATABASE_WAIT, which ends the connection
DEAF = "no notification arrives through a pooler"

log = logging.getLogger(__name__)


class Refresher:
    """Keeps the preferences of one worker up to date, in one thread with its own connection.

    The thread listens for changes and reloads all preferences after each change. It also reloads
    when it connects, because PostgreSQL does not repeat missed notifications, and before the cache
    expires. Failures are retried with backoff.

    Shared with the caller of `close`: `_stopping` and `_end`. The thread alone uses all the rest.

    Args:
        database: read when there is neither a replica nor a listening connection.
        listening: where to listen for changes; None not to listen.
        replica: read first when the cache is about to expire; None if there is none.
    """

    def __init__(
        self,
        preferences: Preferences,
        database: Database,
        *,
        listening: Database | None = None,
        replica: Database | None = None,
    ) -> None:
        self._preferences = preferences
        self._database = database
        self._listening = listening
        self._replica = replica
        self._connection: Connection | None = None
        self._host = (listening or database).hosts  # of the connection, or of the next one
        self._connected_before = False
        self._connects = _Backoff()
        self._reloads = _Backoff()
        self._replica_reads = _Backoff()
        self._heartbeat_at = 0.0
        self._heard = 0  # notifications since the last reload
        self._stopping = False
        self._end = ExitStack()

    def start(self) -> None:
        """Start the thread, which loads the preferences at once."""
        self._alarm, bell = socket.socketpair()
        # A daemon: a hung connection must not keep a stopping worker alive.
        thread = threading.Thread(target=self._run, name="refresher", daemon=True)
        self._end.callback(thread.join, DATABASE_WAIT)
        self._end.callback(bell.close)
        thread.start()

    def close(self) -> None:
        """End the thread; abandon it if it still waits for PostgreSQL after DATABASE_WAIT."""
        self._stopping = True
        self._end.close()

    def _run(self) -> None:
        with self._alarm:
            while not self._stopping:
                try:
                    self._turn()
                except (psycopg.Error, OSError) as error:
                    _log(error, self._host)
                    self._disconnect()
                except Exception:
                    log.exception("could not refresh the preferences")
                    self._disconnect()
                    self._reloads.fail()
            self._disconnect()

    def _turn(self) -> None:
        """Do the next task that is due, or wait; raises errors of the listening connection."""
        if self._connection:
            self._attend(self._connection)
        elif self._listening and self._connects.due():
            self._connect(self._listening)
        elif self._reloads.due():
            self._reload()
        else:
            self._wait(min(self._reloads.at, self._connects.at if self._listening else math.inf))

    def _connect(self, place: Database) -> None:
        if self._connected_before:
            metrics.LISTENER_RECONNECTS.inc()
        self._connected_before, self._host = True, place.hosts
        self._connection = connection = place.connect()
        self._host = host_of(connection)
        with bounded(connection, DATABASE_WAIT):
            _prove_delivery(connection, place)
            # A payload may be no text. PostgreSQL ends a connection for which it cannot convert
            # one, and psycopg's own handler cannot decode it.
            connection.execute("SET client_encoding TO sql_ascii")
            connection.pgconn.notify_handler = self._hear
            connection.execute(f"LISTEN {CHANGES}")
        self._preferences.reload(connection)
        self._connects.succeed(math.inf)
        self._reloaded()
        self._postpone_heartbeat()
        metrics.LISTENER_CONNECTED.set(1)
        log.info("listening for changes of preferences")

    def _disconnect(self) -> None:
        metrics.LISTENER_CONNECTED.set(0)
        if self._connection:
            self._connection.close()
            self._connection = None
            if self._preferences.lacking():
                self._reloads.at = min(self._reloads.at, time.monotonic() + LACKING)
        self._connects.fail()

    def _hear(self, _: PGnotify) -> None:
        """Count a notification. A list of them would take much memory in a flood."""
        self._heard += 1

    def _attend(self, connection: Connection) -> None:
        connection.pgconn.consume_input()
        for notification in iter(connection.pgconn.notifies, None):
            self._hear(notification)
        if self._heard:
            metrics.NOTIFICATIONS_HEARD.inc(self._heard)
            self._heard = 0
            self._postpone_heartbeat()
            self._preferences.reload(connection)
            self._reloaded()
            self._wait(time.monotonic() + SPACING)
        elif self._reloads.due():
            self._reload()
        elif time.monotonic() >= self._heartbeat_at:
            with bounded(connection, DATABASE_WAIT):
                connection.execute("SELECT 1")
            self._postpone_heartbeat()
        else:
            self._wait(min(self._reloads.at, self._heartbeat_at), connection)

    def _reload(self) -> None:
        """Reload because the cache is about to expire; prefer the replica, unless it lags."""
        if self._read_replica():
            self._reloaded()
        elif self._connection:
            self._preferences.reload(self._connection)
            self._reloaded()
        elif self._read(self._database):
            self._reloaded()
        else:
            self._reloads.fail()

    def _read_replica(self) -> bool:
        """Reload from the replica if it is due, and return True if that succeeded.

        The replica has its own backoff: while a read of it hangs, changes go unnoticed.
        """
        if not self._replica or not self._replica_reads.due():
            return False
        if self._read(self._replica):
            self._replica_reads.succeed(0.0)
            return True
        self._replica_reads.fail()
        return False

    def _read(self, database: Database) -> bool:
        host = database.hosts
        try:
            with database.connect() as connection:
                host = host_of(connection)
                kept = self._preferences.reload(connection)
        except (psycopg.Error, OSError) as error:
            _log(error, host)
            return False
        if not kept:
            log.warning("standby lags behind, its rows are ignored")
        return kept

    def _reloaded(self) -> None:
        wait = self._preferences.lifetime * _jitter(0.6, 0.8)
        if self._preferences.lacking() and not self._connection:
            wait = min(wait, LACKING)
        self._reloads.succeed(time.monotonic() + wait)

    def _postpone_heartbeat(self) -> None:
        self._heartbeat_at = time.monotonic() + HEARTBEAT

    def _wait(self, until: float, connection: Connection | None = None) -> None:
        """Return at `until`, when a notification arrives, or when `close` is called."""
        poll = select.poll()
        poll.register(self._alarm, select.POLLIN)
        if connection:
            poll.register(connection.fileno(), select.POLLIN)
        poll.poll(max(0.0, 1000 * (until - time.monotonic())))


class _Backoff:
    """The time of the next try: exponential backoff, with jitter to spread the workers."""

    def __init__(self) -> None:
        self.at = 0.0
        self._pause = SHORTEST_PAUSE

    def due(self) -> bool:
        return time.monotonic() >= self.at

    def fail(self) -> None:
        self.at = time.monotonic() + self._pause * _jitter(0.5, 1.0)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def succeed(self, next_at: float) -> None:
        self.at = next_at
        self._pause = SHORTEST_PAUSE


def _prove_delivery(connection: Connection, place: Database) -> None:
    """Check that notifications arrive on `connection`, by sending one if there is a pooler.

    A pooler that pools transactions accepts LISTEN, but never delivers a notification. There is a
    pooler if the connection's process id, which a pooler makes up, differs from PostgreSQL's.

    Raises:
        psycopg.OperationalError: the notification did not arrive.
    """
    (process,) = connection.execute("SELECT pg_backend_pid()").fetchall()[0]
    if process == connection.info.backend_pid:
        return
    token = uuid.uuid4().hex
    connection.execute(f"LISTEN {PROBES}")
    with place.connect() as other, bounded(other, PROBE_WAIT):
        other.execute("SELECT pg_notify(%s, %s)", (PROBES, token))
    if token not in (probe.payload for probe in connection.notifies(timeout=PROBE_WAIT)):
        raise psycopg.OperationalError(DEAF)
    connection.execute(f"UNLISTEN {PROBES}")


def _jitter(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 no secret depends on it


def _log(error: BaseException, host: str) -> None:
    log.error("database error", extra=log_fields(error, host))
