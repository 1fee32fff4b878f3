"""The rows of providers, and their changes while the service reads them."""

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from notifier.models import Channel
from notifier.settings import Settings
from notifier.store import migrations
from tools.chaos.evidence import Absence
from tools.chaos.providers import Provider
from tools.dev import postgres
from tools.rig import owner

# How many providers of a channel have a row: at the start, and at least.
AT_START, AT_LEAST = 3, 2


class Rows:
    """The providers of each channel that have a row. One thread at a time uses it."""

    def __init__(self, server: postgres.Server, providers: list[Provider]) -> None:
        self.changed = 0.0  # time.time() before the last change
        self._server = server
        self._active: dict[Channel, list[Provider]] = {channel: [] for channel in Channel}
        self._spare: dict[Channel, list[Provider]] = {
            channel: [one for one in providers if one.channel == channel] for channel in Channel
        }
        self._absent_since: dict[str, float] = {}
        self._absences: list[Absence] = []
        migrations.migrate(Settings.from_env(server.env))
        for channel in Channel:
            for _ in range(AT_START):
                self._add(channel)

    def change(self, kind: str, choice: float) -> bool:
        """Make a change of a kind; return False if none is possible now."""
        rng = random.Random(choice)  # noqa: S311 must be repeatable
        channel = rng.choice([*Channel])
        changes: dict[str, Callable[[], None]] = {
            "reorder rows": partial(self._reorder, channel, rng),
            "remove a row": partial(self._remove, channel, rng),
            "add a row": partial(self._add, channel),
            "replace a URL": partial(self._replace, channel, rng),
        }
        if kind == "remove a row" and len(self._active[channel]) <= AT_LEAST:
            return False
        if kind in {"add a row", "replace a URL"} and not self._spare[channel]:
            return False
        changes[kind]()
        return True

    def absences(self) -> list[Absence]:
        """Return the periods in which a host had no row after it had had one."""
        now = time.time()
        still_absent = [Absence(host, since, now) for host, since in self._absent_since.items()]
        return [*self._absences, *still_absent]

    def _reorder(self, channel: Channel, rng: random.Random) -> None:
        active = self._active[channel]
        rng.shuffle(active)
        self._execute(
            "UPDATE notification_preferences SET priority = array_position(%s, host)"
            " WHERE deleted_at IS NULL AND host = ANY(%s)",
            *[[provider.url for provider in active]] * 2,
        )

    def _remove(self, channel: Channel, rng: random.Random) -> None:
        provider = rng.choice(self._active[channel])
        self._begin_absence(provider)
        self._execute(
            "UPDATE notification_preferences SET deleted_at = now()"
            " WHERE deleted_at IS NULL AND host = %s",
            provider.url,
        )

    def _add(self, channel: Channel) -> None:
        provider = self._spare[channel][0]
        self._execute(
            "INSERT INTO notification_preferences (provider_type, provider_name, host)"
            " VALUES (%s, %s, %s)",
            *(channel, provider.host, provider.url),
        )
        self._end_absence(provider)

    def _replace(self, channel: Channel, rng: random.Random) -> None:
        old, new = rng.choice(self._active[channel]), self._spare[channel][0]
        self._begin_absence(old)
        self._execute(
            "UPDATE notification_preferences SET host = %s WHERE deleted_at IS NULL AND host = %s",
            *(new.url, old.url),
        )
        self._end_absence(new)

    def _begin_absence(self, provider: Provider) -> None:
        """Record it before the commit, because a worker may read the change before we return."""
        self._active[provider.channel].remove(provider)
        self._spare[provider.channel].append(provider)
        self._absent_since[provider.host] = time.time()

    def _end_absence(self, provider: Provider) -> None:
        self._spare[provider.channel].remove(provider)
        self._active[provider.channel].append(provider)
        if since := self._absent_since.pop(provider.host, None):
            self._absences.append(Absence(provider.host, since, time.time()))

    def _execute(self, statement: Any, *arguments: object) -> None:
        self.changed = time.time()
        with owner(self._server).connect() as connection:
            connection.execute(statement, arguments)
