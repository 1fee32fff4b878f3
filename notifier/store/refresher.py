"""When the preferences are read again: at a change, before they expire, and after an outage."""

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

from notifier import metrics
from notifier.store.db import DATABASE_WAIT, Connection, Database, bounded, log_fields
from notifier.store.preferences import CHANGES, Preferences

PROBES: LiteralString = "notification_preferences_probe"

# Many changes one after the other are read with so many seconds between them.
SPACING = 0.02

# A connection on which nothing came for so long is tried; it then has DATABASE_WAIT to answer.
HEARTBEAT = 10.0

# Nothing can be delivered through a channel without a provider, so that it is asked about again
# soon while nobody would tell us of a new one.
LACKING = 1.0

SHORTEST_PAUSE, LONGEST_PAUSE = 0.5, 30.0

PROBE_WAIT = 1.0  # less than DATABASE_WAIT, which ends the connection
DEAF = "nothing is heard through a pooler: DB_LISTEN_HOST, or CACHE_INVALIDATION=off"

log = logging.getLogger(__name__)


class Refresher:
    """Keeps the preferences of one worker up to date, in one thread with a connection of its own.

    It listens for changes, and reads everything when it hears of one and at every connect: what was
    told while it did not listen is not told again. Beneath that it reads everything before what is
    held expires. Whatever fails is tried again after a pause.

    Only its thread touches what is here, but for what `close` uses.

    Args:
        database: asked where there is neither a replica nor a listening connection.
        listening: where changes are told; None to do without.
        replica: asked first where only time has passed; None if there is none.
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
        self._connected_before = False
        self._connects = _Attempts()
        self._reloads = _Attempts()
        self._replica_reads = _Attempts()
        self._heartbeat_at = 0.0
        self._stopping = False
        self._end = ExitStack()

    def start(self) -> None:
        """Begin; the preferences are read at once."""
        self._alarm, bell = socket.socketpair()
        # A daemon: what hangs must not keep a stopping worker alive.
        thread = threading.Thread(target=self._run, name="refresher", daemon=True)
        self._end.callback(thread.join, DATABASE_WAIT)
        self._end.callback(bell.close)
        thread.start()

    def close(self) -> None:
        """End the thread, or leave it behind if it is waiting for PostgreSQL."""
        self._stopping = True
        self._end.close()

    def _run(self) -> None:
        with self._alarm:
            while not self._stopping:
                try:
                    self._turn()
                except (psycopg.Error, OSError) as error:
                    _log(error)
                    self._disconnect()
                except Exception:
                    log.exception("could not refresh the preferences")
                    self._disconnect()
                    self._reloads.fail()
            self._disconnect()

    def _turn(self) -> None:
        """Do what is due, or wait for it; an error is one of the listening connection."""
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
        self._connected_before = True
        self._connection = connection = place.connect()
        with bounded(connection, DATABASE_WAIT):
            _prove_delivery(connection, place)
            connection.execute(f"LISTEN {CHANGES}")
        self._preferences.reload(connection)
        self._connects.succeed(math.inf)
        self._reloaded()
        self._put_heartbeat_off()
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

    def _attend(self, connection: Connection) -> None:
        if heard := [*connection.notifies(timeout=0)]:
            metrics.NOTIFICATIONS_HEARD.inc(len(heard))
            self._put_heartbeat_off()
            self._preferences.reload(connection)
            self._reloaded()
            self._wait(time.monotonic() + SPACING)
        elif self._reloads.due():
            self._reload()
        elif time.monotonic() >= self._heartbeat_at:
            with bounded(connection, DATABASE_WAIT):
                connection.execute("SELECT 1")
            self._put_heartbeat_off()
        else:
            self._wait(min(self._reloads.at, self._heartbeat_at), connection)

    def _reload(self) -> None:
        """Read because time has passed: a replica may be asked, if it is not behind."""
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
        """One that hangs keeps us from hearing of changes: it has pauses of its own."""
        if not self._replica or not self._replica_reads.due():
            return False
        if self._read(self._replica):
            self._replica_reads.succeed(0.0)
            return True
        self._replica_reads.fail()
        return False

    def _read(self, database: Database) -> bool:
        try:
            with database.connect() as connection:
                kept = self._preferences.reload(connection)
        except (psycopg.Error, OSError) as error:
            _log(error)
            return False
        if not kept:
            log.warning("standby is behind, what it has is not used")
        return kept

    def _reloaded(self) -> None:
        wait = self._preferences.lifetime * _by_chance(0.6, 0.8)
        if self._preferences.lacking() and not self._connection:
            wait = min(wait, LACKING)
        self._reloads.succeed(time.monotonic() + wait)

    def _put_heartbeat_off(self) -> None:
        self._heartbeat_at = time.monotonic() + HEARTBEAT

    def _wait(self, until: float, connection: Connection | None = None) -> None:
        """Return at `until`, when there is something to read, or when `close` is called."""
        poll = select.poll()
        poll.register(self._alarm, select.POLLIN)
        if connection:
            poll.register(connection.fileno(), select.POLLIN)
        poll.poll(max(0.0, 1000 * (until - time.monotonic())))


class _Attempts:
    """When to try next: after failures with pauses that double, shortened by chance so that not all
    workers come at once."""

    def __init__(self) -> None:
        self.at = 0.0
        self._pause = SHORTEST_PAUSE

    def due(self) -> bool:
        return time.monotonic() >= self.at

    def fail(self) -> None:
        self.at = time.monotonic() + self._pause * _by_chance(0.5, 1.0)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def succeed(self, next_at: float) -> None:
        self.at = next_at
        self._pause = SHORTEST_PAUSE


def _prove_delivery(connection: Connection, place: Database) -> None:
    """Make sure that what is told reaches us.

    A pooler that hands a server's session to another client after each transaction takes LISTEN
    without a word, and nothing ever comes. That there is a pooler shows by the process id: it gives
    clients one of its own making.

    Raises:
        psycopg.OperationalError: nothing came.
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


def _by_chance(low: float, high: float) -> float:
    return random.uniform(low, high)  # noqa: S311 nothing secret


def _log(error: BaseException) -> None:
    log.error("database error", extra=log_fields(error))
