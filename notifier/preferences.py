"""Which providers serve a channel: the query, and a cache per worker."""

import logging
import threading
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import psycopg

from notifier import metrics
from notifier.db import DATABASE_WAIT, Database, transaction
from notifier.errors import PreferencesUnavailable
from notifier.models import Channel, Provider
from notifier.single_flight import SingleFlight

QUERY = """
    SELECT id, provider_type::text, provider_name, host, secret_key
      FROM notification_preferences
     WHERE provider_type = %s::notification_provider_type AND deleted_at IS NULL
     ORDER BY priority, id
"""

# Nothing can be delivered through a channel without providers, so it is asked about again soon.
EMPTY_LIFETIME = 1.0
MAX_BACKOFF = 30.0

# How a look-up ends: a fresh entry, a query, an expired entry, nothing to serve.
RESULTS = ("hit", "miss", "stale", "error")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    providers: tuple[Provider, ...]
    reload_at: float
    failed_reloads: int = 0  # since the last good one; above 0 the entry has expired


class Preferences:
    """The providers of each channel, in the order they are tried.

    Shared: the entries, whose single reads and writes are atomic. Only the one reload per channel
    that may be under way writes entries.

    Args:
        lifetime: seconds until an entry expires.
        on_load: is told the hosts of all known providers after each load, one call at a time.
    """

    def __init__(
        self,
        database: Database,
        lifetime: float,
        clock: Callable[[], float] = time.monotonic,
        on_load: Callable[[Set[str]], None] = lambda _: None,
    ) -> None:
        self._database = database
        self._lifetime = lifetime
        self._clock = clock
        self._on_load = on_load
        self._telling = threading.Lock()
        self._entries: dict[Channel, _Entry] = {}
        self._reloads: SingleFlight[Channel, _Entry] = SingleFlight("preferences")
        self._count = {result: metrics.PREFERENCE_CACHE.labels(result) for result in RESULTS}

    def providers(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel` by priority, then id; possibly none.

        Expired ones are served as long as PostgreSQL cannot be asked.

        Args:
            deadline: on `time.monotonic()`; nobody waits longer, nor longer than `DATABASE_WAIT`.

        Raises:
            PreferencesUnavailable: PostgreSQL cannot be asked, and nothing is known from before.
        """
        try:
            entry, result = self._look_up(channel, deadline)
        except PreferencesUnavailable:
            self._count["error"].inc()
            raise
        if entry.failed_reloads:
            log.warning("serving expired preferences", extra={"channel": channel})
            result = "stale"
        self._count[result].inc()
        return entry.providers

    def held(self) -> bool:
        """Say whether the providers of every channel are known here, be they expired."""
        return all(channel in self._entries for channel in Channel)

    def load(self, deadline: float) -> None:
        """Ask PostgreSQL for what is not held yet; `deadline` is on `time.monotonic()`.

        Raises:
            PreferencesUnavailable: it cannot be asked.
        """
        for channel in Channel:
            if channel not in self._entries:
                self.providers(channel, deadline)

    def _look_up(self, channel: Channel, deadline: float) -> tuple[_Entry, str]:
        entry = self._entries.get(channel)
        if entry is not None and self._clock() < entry.reload_at:
            log.debug("preferences cache hit", extra={"channel": channel})
            return entry, "hit"
        log.debug("preferences cache miss", extra={"channel": channel})
        return self._ask(channel, entry, deadline), "miss"

    def _ask(self, channel: Channel, known: _Entry | None, deadline: float) -> _Entry:
        wait = max(0.0, min(DATABASE_WAIT, deadline - time.monotonic()))
        try:
            return self._reloads.run(channel, lambda: self._reload(channel), wait)
        except TimeoutError as error:
            if known is None:
                raise PreferencesUnavailable from error
            return replace(known, failed_reloads=known.failed_reloads + 1)

    def _reload(self, channel: Channel) -> _Entry:
        try:
            with self._database.connect() as connection, transaction(connection):
                rows = connection.execute(QUERY, (channel.value,)).fetchall()
        except (psycopg.Error, OSError) as error:
            fields = {"channel": channel, "error": type(error).__name__}
            log.error("database error", extra=fields)  # noqa: TRY400 its text names hosts and users
            self._entries[channel] = entry = self._expired(channel)
            return entry
        providers = tuple(Provider.from_row(row) for row in rows)
        lifetime = self._lifetime if providers else min(self._lifetime, EMPTY_LIFETIME)
        self._entries[channel] = entry = _Entry(providers, self._clock() + lifetime)
        self._tell()
        return entry

    def _tell(self) -> None:
        with self._telling:  # or a load of another channel could be told before and undone here
            entries = list(self._entries.values())
            hosts = (provider.host for entry in entries for provider in entry.providers)
            self._on_load({host for host in hosts if host})

    def _expired(self, channel: Channel) -> _Entry:
        """Return what is known, to be served for a while that doubles with each failure."""
        known = self._entries.get(channel)
        if known is None:
            raise PreferencesUnavailable
        pause = min(MAX_BACKOFF, 2.0 ** min(known.failed_reloads, 10))
        return replace(
            known, reload_at=self._clock() + pause, failed_reloads=known.failed_reloads + 1
        )
