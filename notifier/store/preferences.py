"""Which providers serve a channel: the query, and what a worker holds of its answer."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import LiteralString

import psycopg

from notifier import metrics
from notifier.errors import PreferencesUnavailable
from notifier.logs import Sparing
from notifier.models import Channel, Provider
from notifier.single_flight import SingleFlight
from notifier.store.db import Connection, Database, log_fields, transaction

QUERY = """
    SELECT id, provider_type::text, provider_name, host, secret_key
      FROM notification_preferences
     WHERE provider_type = ANY(%s::notification_provider_type[]) AND deleted_at IS NULL
     ORDER BY provider_type, priority, id
"""

# How far a standby has replayed the primary's log, in bytes; NULL on a primary.
REPLAYED = """
    SELECT CASE WHEN pg_is_in_recovery()
                THEN coalesce((pg_last_wal_replay_lsn() - '0/0'::pg_lsn)::bigint, 0) END
"""

# Where the primary's log ends: what a query has seen lies before, also what is not yet flushed.
WRITTEN = "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint"

# Where the trigger tells of a change, by NOTIFY with the provider type.
CHANGES: LiteralString = "notification_preferences"

# What is held is not asked for again in less: a shorter lifetime counts as this.
SHORTEST_LIFETIME = 1.0

# After a first load that failed nobody begins another one so soon.
FIRST_LOAD_PAUSE = 1.0

# How a look-up ends: held, the first load, expired, nothing to serve.
RESULTS = ("hit", "miss", "stale", "error")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    providers: Mapping[Channel, tuple[Provider, ...]]
    expires: float


@dataclass(frozen=True, slots=True)
class _Load:
    """What was read, and the place in the primary's log up to which it is known to be complete."""

    providers: Mapping[Channel, tuple[Provider, ...]]
    position: int
    from_standby: bool


class Preferences:
    """The providers of each channel, in the order they are tried.

    A look-up asks PostgreSQL only while nothing is held. What is held is replaced as a whole by
    `reload`, which somebody else calls in time, and is served until then, be it expired.

    Shared: what is held, one reference that is read without a lock and replaced under `_keeping`,
    which also guards what decides about that: the generation and the position. The time of the
    first load is unguarded: at worst one more is begun.

    Args:
        database: asked by the first look-up.
        lifetime: seconds until what is held has expired.
        on_load: is told the hosts of all providers after each load, one call at a time.
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
        self._begun = itertools.count(1)
        self._generation = 0  # the number of the load that is held
        self._last_primary_load = 0  # the number of the last load from the primary
        self._position = 0  # of that load
        self._first_load: SingleFlight[str, None] = SingleFlight("preferences")
        self._first_load_at = -math.inf
        self._waiting_ends: float | None = None
        self._stale = Sparing(clock)
        self._count = {result: metrics.PREFERENCE_CACHE.labels(result) for result in RESULTS}

    def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel` by priority, then id; possibly none.

        Args:
            deadline: on `time.monotonic()`; nobody waits longer for the first load, nor longer
                than the database's `wait`.

        Raises:
            PreferencesUnavailable: PostgreSQL cannot be asked, and nothing is held.
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
        """Say whether the providers are known here, be they expired."""
        return self._held is not None

    def lacking(self) -> bool:
        """Say whether a channel has no provider, as far as is known here."""
        held = self._held
        return held is None or not all(held.providers.values())

    def load(self, deadline: float) -> None:
        """Ask PostgreSQL if nothing is held yet; `deadline` is on `time.monotonic()`.

        Raises:
            PreferencesUnavailable: it cannot be asked.
        """
        if self._held is None:
            self._load_first(deadline)

    def reload(self, connection: Connection) -> bool:
        """Replace what is held by what PostgreSQL has now; say whether that was not older.

        It is older if a load that began later has ended already (for one from the primary: another
        from there), or if it comes from a standby that has not replayed what the primary had shown.

        Raises:
            psycopg.Error: PostgreSQL cannot be asked; what is held stays.
        """
        generation = next(self._begun)
        return self._keep(_read(connection), generation)

    def _load_first(self, deadline: float) -> _Held:
        """Return what is held after the first load, whoever began it.

        Everybody waits for it, but only until the first of them has waited in vain: in an outage
        threads that wait would leave none for others.
        """
        log.debug("preferences cache miss")
        if self._waiting_ends is None:
            self._waiting_ends = time.monotonic() + self._database.wait
        if self._clock() >= self._first_load_at:
            wait = max(0.0, min(deadline, self._waiting_ends) - time.monotonic())
            with suppress(TimeoutError):
                self._first_load.run("all", self._ask, wait)
        held = self._held  # the refresher may have been faster
        self._count["error" if held is None else "miss"].inc()
        if held is None:
            raise PreferencesUnavailable
        return held

    def _ask(self) -> None:
        try:
            with self._database.connect() as connection:
                self.reload(connection)
        except (psycopg.Error, OSError) as error:
            self._first_load_at = self._clock() + FIRST_LOAD_PAUSE
            log.error("database error", extra=log_fields(error))  # noqa: TRY400 its text names hosts

    def _keep(self, load: _Load, generation: int) -> bool:
        with self._keeping:
            behind = load.from_standby and load.position < self._position
            # A standby that was asked later may still have less than the primary.
            overtaken_by = self._generation if load.from_standby else self._last_primary_load
            if behind or generation < overtaken_by:
                return False
            self._generation = generation
            if not load.from_standby:
                self._last_primary_load, self._position = generation, load.position
            self._held = _Held(load.providers, self._clock() + self.lifetime)
            metrics.LAST_REFRESH.set_to_current_time()
            self._on_load(_hosts(load.providers))
        return True


def _read(connection: Connection) -> _Load:
    """Read the position before the rows on a standby, and after them on a primary.

    So that what the rows show is at least what was there at the position on a standby, and at most
    that on a primary.
    """
    channels = [channel.value for channel in Channel]
    with transaction(connection):
        replayed = _value(connection, REPLAYED)
        rows = connection.execute(QUERY, (channels,)).fetchall()
        position = _value(connection, WRITTEN) if replayed is None else replayed
    providers = [Provider.from_row(row) for row in rows]
    by_channel = {
        channel: tuple(provider for provider in providers if provider.channel is channel)
        for channel in Channel
    }
    return _Load(by_channel, position or 0, from_standby=replayed is not None)


def _value(connection: Connection, query: LiteralString) -> int | None:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def _hosts(providers: Mapping[Channel, tuple[Provider, ...]]) -> set[str]:
    return {one.host for some in providers.values() for one in some if one.host}
