"""Hands the providers on to workers that start later, which may be during an outage."""

import json
import logging
import time
from collections.abc import Mapping, Set
from dataclasses import astuple, dataclass
from functools import partial

from notifier import __version__
from notifier.models import Channel, Provider
from notifier.settings import Settings
from notifier.sharing.snapshot import Snapshot

Providers = Mapping[Channel, tuple[Provider, ...]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """The rows, and the position in the primary's log up to which they are known to be complete.

    `unusable` has the id, the column and the problem of each row that cannot be a provider.
    """

    providers: Providers
    position: int
    from_standby: bool
    unusable: Set[tuple[int | str | None, str, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Standing:
    """The load that counts, and the last one from the primary: generations, and its position.

    A generation is the time at which a load began, in nanoseconds of the system's monotonic clock,
    which all workers share.
    """

    generation: int = 0
    primary_generation: int = 0
    position: int = 0

    def after(self, load: Load, generation: int) -> "Standing | None":
        """Return the standing with `load`; None if the load is stale.

        A load is stale if a load that began later has already ended. A load from a standby is also
        stale if the standby has not replayed the log up to the last load from the primary. Only a
        later load from the primary makes a load from the primary stale.
        """
        if not load.from_standby:
            is_newest = generation >= self.primary_generation
            return Standing(generation, generation, load.position) if is_newest else None
        if load.position < self.position or generation < self.generation:
            return None
        return Standing(generation, self.primary_generation, self.position)


class Handover:
    """The providers that the workers of one master share, for those that start later.

    The caller serializes access. A failure harms neither the start nor a load; malformed content
    counts as none. Failures are logged once, until a load has been handed over again.
    """

    def __init__(self, snapshot: Snapshot, settings: Settings) -> None:
        self._snapshot = snapshot
        # Rows of another database, or of another version of the service, are not taken over.
        self._source = [__version__, *settings.serve_place, settings.db_name]
        self._fails = False

    def take(self) -> tuple[Standing, Providers] | None:
        """Return what another worker has handed over; None if there is nothing."""
        try:
            standing, rows = self._decoded(self._snapshot.read())
            return (standing, _providers(rows)) if rows else None
        except Exception as error:  # noqa: BLE001 content can raise any
            self._log(error)
            return None

    def give(self, load: Load, generation: int) -> None:
        """Hand `load` over, unless another worker's is newer."""
        try:
            self._snapshot.replace(partial(self._newer, load, generation))
        except Exception as error:  # noqa: BLE001 a load must not fail
            self._log(error)
        else:
            self._fails = False

    def _newer(self, load: Load, generation: int, value: bytes) -> bytes | None:
        standing = self._decoded(value)[0].after(load, generation)
        if standing is None:
            return None
        head = json.dumps([self._source, *astuple(standing)])
        rows = [one.row() for providers in load.providers.values() for one in providers]
        return f"{head}\n{json.dumps(rows)}".encode()

    def _decoded(self, value: bytes) -> tuple[Standing, bytes]:
        """Return the standing, and the rows as JSON; no rows if they are not from our source."""
        head, _, rows = value.partition(b"\n")
        try:
            source, *numbers = json.loads(head or b"[null]")
            if source == self._source:
                return _standing(*numbers), rows
        except Exception as error:  # noqa: BLE001 content can raise any
            self._log(error)
        return Standing(), b""

    def _log(self, error: Exception) -> None:
        if not self._fails:
            reason = error.strerror if isinstance(error, OSError) else "malformed"
            fields = {"error": type(error).__name__, "reason": reason}
            log.warning("providers are not handed over", extra=fields)
        self._fails = True


def _standing(generation: int, primary_generation: int, position: int) -> Standing:
    """Return the standing of decoded numbers; one from the future would never be replaced."""
    numbers = (generation, primary_generation, position)
    are_integers = all(type(number) is int for number in numbers)
    if not are_integers or not 0 <= primary_generation <= generation <= time.monotonic_ns():
        raise ValueError("not a standing")
    return Standing(*numbers)


def _providers(rows: bytes) -> Providers:
    providers: dict[Channel, list[Provider]] = {channel: [] for channel in Channel}
    for row in json.loads(rows):
        provider = Provider.from_row(row)
        providers[provider.channel].append(provider)
    return {channel: tuple(found) for channel, found in providers.items()}
