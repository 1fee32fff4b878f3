"""Which providers serve a channel: the query, and a cache per worker."""

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg

from notifier.db import DATABASE_WAIT, Database
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

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    providers: tuple[Provider, ...]
    reload_at: float
    failed_reloads: int = 0  # since the last good one; above 0 the entry has expired


class Preferences:
    """The providers of each channel, in the order they are tried.

    Shared: the entries and the count, whose single reads and writes are atomic. Only the one reload
    per channel that may be under way writes entries.
    """

    def __init__(
        self, database: Database, lifetime: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._lifetime = lifetime
        self._clock = clock
        self._entries: dict[Channel, _Entry] = {}
        self._reloads: SingleFlight[Channel, _Entry] = SingleFlight("preferences")
        self._stale_served = itertools.count(1)

    def providers(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel` by priority, then id; possibly none.

        Expired ones are served as long as PostgreSQL cannot be asked.

        Args:
            deadline: on `time.monotonic()`; nobody waits longer, nor longer than `DATABASE_WAIT`.

        Raises:
            PreferencesUnavailable: PostgreSQL cannot be asked, and nothing is known from before.
        """
        entry = self._entries.get(channel)
        if entry is None or self._clock() >= entry.reload_at:
            entry = self._ask(channel, entry, deadline)
        else:
            log.debug("preferences cache hit", extra={"channel": channel})
        if entry.failed_reloads:
            log.warning(
                "serving expired preferences",
                extra={"channel": channel, "stale_served": next(self._stale_served)},
            )
        return entry.providers

    def _ask(self, channel: Channel, known: _Entry | None, deadline: float) -> _Entry:
        log.debug("preferences cache miss", extra={"channel": channel})
        wait = max(0.0, min(DATABASE_WAIT, deadline - time.monotonic()))
        try:
            return self._reloads.run(channel, lambda: self._reload(channel), wait)
        except TimeoutError as error:
            if known is None:
                raise PreferencesUnavailable from error
            return replace(known, failed_reloads=known.failed_reloads + 1)

    def _reload(self, channel: Channel) -> _Entry:
        try:
            rows = self._database.fetch(QUERY, (channel.value,))
        except (psycopg.Error, OSError) as error:
            fields = {"channel": channel, "error": type(error).__name__}
            log.error("database error", extra=fields)  # noqa: TRY400 its text names hosts and users
            self._entries[channel] = entry = self._expired(channel)
            return entry
        providers = tuple(Provider.from_row(row) for row in rows)
        lifetime = self._lifetime if providers else min(self._lifetime, EMPTY_LIFETIME)
        self._entries[channel] = entry = _Entry(providers, self._clock() + lifetime)
        return entry

    def _expired(self, channel: Channel) -> _Entry:
        """Return what is known, to be served for a while that doubles with each failure."""
        known = self._entries.get(channel)
        if known is None:
            raise PreferencesUnavailable
        pause = min(MAX_BACKOFF, 2.0 ** min(known.failed_reloads, 10))
        return replace(
            known, reload_at=self._clock() + pause, failed_reloads=known.failed_reloads + 1
        )
