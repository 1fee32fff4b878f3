"""The providers of each channel: the query, and the cache of one worker."""

import logging
import math
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import LiteralString

import psycopg

from notifier import metrics
from notifier.errors import PreferencesUnavailable
from notifier.logs import OncePerSecond
from notifier.models import Channel, Provider, Unusable
from notifier.single_flight import SingleFlight
from notifier.store import rows
from notifier.store.db import Connection, Database, host_of, log_fields, transaction
from notifier.store.handover import Handover, Load, Providers, Standing

QUERY = f"""
    SELECT {rows.SELECTED}
      FROM notification_preferences
     WHERE deleted_at IS NULL
     ORDER BY provider_type, priority, id
"""  # noqa: S608 only constants

# How far a standby has replayed the primary's log (WAL), in bytes; NULL on a primary.
REPLAYED = """
    SELECT CASE WHEN pg_is_in_recovery()
                THEN coalesce((pg_last_wal_replay_lsn() - '0/0'::pg_lsn)::bigint, 0) END
"""

# Where the primary's log ends, in bytes. Every row that a query has seen was written before this
# position, even if it is not flushed yet.
WRITTEN = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"

# The trigger sends NOTIFY on this channel at each change, with the provider type as payload.
CHANGES: LiteralString = "notification_preferences"

# Minimum lifetime of the cache in seconds; a shorter setting is raised to it.
SHORTEST_LIFETIME = 1.0

# Seconds after a failed first load before a look-up may start another one.
FIRST_LOAD_PAUSE = 1.0

# Results of a look-up: from the cache, from the first load, from an expired cache, none.
RESULTS = ("hit", "miss", "stale", "error")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    providers: Providers
    expires: float


class Preferences:
    """The providers of each channel, in the order they are tried.

    A look-up queries PostgreSQL only while the cache is empty. `reload`, which the refresher calls,
    replaces the cache as a whole; until then look-ups use it, even if it has expired.

    Shared between threads: `_held`, the cache, is one reference and is read without a lock.
    `_keeping` guards its replacement, the standing and the handover. The times of the first load
    are unguarded: a race only starts one load too many.

    Args:
        database: read by the first look-up.
        lifetime: seconds until the cache expires.
        on_load: called with the endpoints of all providers after each load, one call at a time.
    """

    def __init__(
        self,
        database: Database,
        lifetime: float,
        clock: Callable[[], float] = time.monotonic,
        on_load: Callable[[Set[str]], None] = lambda _: None,
    ) -> None:
        self.lifetime = max(lifetime, SHORTEST_LIFETIME)
        self._database = database
        self._clock = clock
        self._on_load = on_load
        self._held: _Held | None = None
        self._keeping = threading.Lock()
        self._standing = Standing()
        self._handover: Handover | None = None
        self._unusable: Set[tuple[int | str | None, str, str]] = frozenset()
        self._first_load: SingleFlight[str, None] = SingleFlight("preferences")
        self._first_load_at = -math.inf
        self._waiting_ends: float | None = None
        self._stale = OncePerSecond(clock)
        self._count = {result: metrics.PREFERENCE_CACHE.labels(result) for result in RESULTS}

    def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel` by priority, then id; possibly none.

        Args:
            deadline: on `time.monotonic()`, for the first load; the database's `wait` limits it
                too.

        Raises:
            PreferencesUnavailable: the cache is empty, and PostgreSQL cannot be read.
        """
        held = self._held
        if held is None:
            held = self._load_first(deadline)
        elif self._clock() < held.expires:
            log.debug("preferences cache hit", extra={"channel": channel})
            self._count["hit"].inc()
        else:
            self._count["stale"].inc()
            if times := self._stale.times("all"):
                log.warning("serving expired preferences", extra={"times": times})
        return held.providers[channel]

    def held(self) -> bool:
        """Return True if the cache holds providers, even if they have expired."""
        return self._held is not None

    def lacking(self) -> bool:
        """Return True if the cache is empty or lacks a provider for a channel."""
        held = self._held
        return held is None or not all(held.providers.values())

    def load(self, deadline: float) -> None:
        """Fill the cache if it is empty; `deadline` is on `time.monotonic()`.

        Raises:
            PreferencesUnavailable: PostgreSQL cannot be read.
        """
        if self._held is None:
            self._load_first(deadline)

    def reload(self, connection: Connection) -> bool:
        """Read PostgreSQL into the cache; return False if the rows are stale and were dropped.

        `Standing.after` says when rows are stale.

        Raises:
            psycopg.Error: PostgreSQL cannot be read; the cache stays.
        """
        generation = time.monotonic_ns()
        return self._keep(_read(connection), generation)

    def inherit(self, handover: Handover) -> None:
        """Begin with the providers that another worker has read, and hand over all later loads."""
        self._handover = handover
        self._take()

    def _take(self) -> None:
        """Take over the providers that another worker has read, if the cache is empty."""
        with self._keeping:
            if self._handover and self._held is None and (found := self._handover.take()):
                standing, providers = found
                self._hold(standing, providers, (time.monotonic_ns() - standing.generation) / 1e9)

    def _load_first(self, deadline: float) -> _Held:
        """Return the cache after the first load, unless another worker has handed one over.

        Raises:
            PreferencesUnavailable: there is neither.
        """
        log.debug("preferences cache miss")
        self._take()
        if self._held is None:
            self._wait_for_load(deadline)
            self._take()  # another worker may have been luckier
        held = self._held
        self._count["error" if held is None else "miss"].inc()
        if held is None:
            raise PreferencesUnavailable
        return held

    def _wait_for_load(self, deadline: float) -> None:
        """Wait for the first load, which another thread may have started.

        Threads wait for it only until the first thread gives up. Otherwise, in an outage, waiting
        threads would leave none for other requests.
        """
        if self._waiting_ends is None:
            self._waiting_ends = time.monotonic() + self._database.wait
        if self._clock() >= self._first_load_at:
            wait = max(0.0, min(deadline, self._waiting_ends) - time.monotonic())
            try:
                self._first_load.run("all", self._ask, wait)
            except TimeoutError:
                pass
            except OSError as error:  # no thread could start
                fields = log_fields(error, self._database.hosts)
                log.error("database error", extra=fields)  # noqa: TRY400 expected

    def _ask(self) -> None:
        host = self._database.hosts
        try:
            with self._database.connect() as connection:
                host = host_of(connection)
                self.reload(connection)
        except (psycopg.Error, OSError) as error:
            self._first_load_at = self._clock() + FIRST_LOAD_PAUSE
            log.error("database error", extra=log_fields(error, host))  # noqa: TRY400 it names users

    def _keep(self, load: Load, generation: int) -> bool:
        with self._keeping:
            standing = self._standing.after(load, generation)
            if standing is None:
                return False
            self._hold(standing, load.providers)
            self._log_unusable(load.unusable)
            if self._handover:
                self._handover.give(load, generation)
        return True

    def _hold(self, standing: Standing, providers: Providers, age: float = 0.0) -> None:
        """Replace the cache by providers that were read `age` seconds ago."""
        self._standing = standing
        self._held = _Held(providers, self._clock() - age + self.lifetime)
        metrics.LAST_REFRESH.set(time.time() - age)
        self._on_load(_endpoints(providers))

    def _log_unusable(self, unusable: Set[tuple[int | str | None, str, str]]) -> None:
        """Log the rows that have become unusable since the last load."""
        for provider_id, column, problem in sorted(unusable - self._unusable, key=str):
            fields = {"provider_id": provider_id, "column": column, "problem": problem}
            log.error("provider row skipped", extra=fields)
        self._unusable = unusable


def _read(connection: Connection) -> Load:
    """Return the rows, and the position in the log.

    On a standby the position is read before the rows, so the rows are at least as new. On a primary
    it is read after the rows, so the rows are at most as new.
    """
    with transaction(connection):
        replayed = _value(connection, REPLAYED)
        found = connection.execute(QUERY).fetchall()
        position = _value(connection, WRITTEN) if replayed is None else replayed
    by_channel: dict[Channel, list[Provider]] = {channel: [] for channel in Channel}
    unusable = set()
    for row in found:
        try:
            provider = rows.provider(row)
            by_channel[provider.channel].append(provider)
        except Unusable as error:
            unusable.add((rows.integer(row[0]), error.column, error.problem))
    providers = {channel: tuple(found) for channel, found in by_channel.items()}
    return Load(providers, position or 0, replayed is not None, unusable)


def _value(connection: Connection, query: LiteralString) -> int | None:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def _endpoints(providers: Providers) -> set[str]:
    return {one.endpoint for some in providers.values() for one in some if one.endpoint}
