"""The schedule of faults; the same seed makes the same schedule."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from tools.chaos.providers import ACCEPTS, BEHAVIOURS

STALL = "log reader stalls"

# No process ends while the reader stalls: its last lines would be lost, and they are evidence. So
# all these are on one track.
PROCESSES = ("kill a worker", "reload", STALL)
MACHINE = ("memory full",)
CALLERS = ("silent callers",)
DATABASE = (
    "PostgreSQL killed",
    "PostgreSQL hangs",
    "PostgreSQL stopped",
    "PostgreSQL does not accept",
)
ROWS = ("reorder rows", "remove a row", "add a row", "replace a URL")
HOSTILE = tuple(name for name in BEHAVIOURS if name != ACCEPTS)


class Fault(NamedTuple):
    """A fault: its time in the chaos, its kind, its duration, and the random choice of a target."""

    at: float  # seconds from the start of the chaos
    kind: str
    seconds: float
    choice: float  # at least 0, less than 1


@dataclass(frozen=True, slots=True)
class Kinds:
    """The kinds of faults that may happen."""

    processes: Sequence[str] = PROCESSES
    machine: Sequence[str] = MACHINE
    callers: Sequence[str] = CALLERS
    database: Sequence[str] = (*DATABASE, *ROWS)
    providers: Sequence[str] = HOSTILE

    def all(self) -> frozenset[str]:
        """Return all kinds."""
        tracks = (self.processes, self.machine, self.callers, self.database, self.providers)
        return frozenset(chain.from_iterable(tracks))


EVERYTHING = Kinds()


class Pace(NamedTuple):
    """The least and most seconds between the faults of a track, and of a fault's duration."""

    pause: tuple[float, float]
    duration: tuple[float, float]


PROCESSES_PACE = Pace((2.0, 6.0), (0.0, 0.0))
MACHINE_PACE = Pace((2.0, 8.0), (2.0, 8.0))
DATABASE_PACE = Pace((0.5, 2.0), (0.5, 3.5))
PROVIDER_PACE = Pace((0.5, 3.0), (0.5, 2.5))

# Far less than a worker's queue of log lines has room for, and more than a pipe has room for.
STALL_SECONDS = (3.0, 5.0)

# Workers are killed and reloaded only in this share of the time. The last ones then live for long
# enough to show a leak.
PROCESSES_SHARE = 2 / 3

Track = tuple[Fault, ...]


class Schedule(NamedTuple):
    """Tracks that run concurrently; the faults of one track do not overlap."""

    processes: Track
    machine: Track
    database: Track
    providers: tuple[Track, ...]  # one track per provider


def plan(seed: int, seconds: float, providers: int, kinds: Kinds) -> Schedule:
    """Return the schedule for a chaos of `seconds`."""
    rng = random.Random(seed)  # noqa: S311 must be repeatable, not secret

    def track(kinds: Sequence[str], pace: Pace, share: float = 1.0) -> Track:
        return tuple(_track(rng, share * seconds, kinds, pace))

    return Schedule(
        track(kinds.processes, PROCESSES_PACE, PROCESSES_SHARE),
        track(kinds.machine, MACHINE_PACE),
        track(kinds.database, DATABASE_PACE),
        tuple(track(kinds.providers, PROVIDER_PACE) for _ in range(providers)),
    )


def _track(rng: random.Random, seconds: float, kinds: Sequence[str], pace: Pace) -> Iterator[Fault]:
    """Yield every kind once in random order, then again, until the time is over."""
    at = 0.0
    while kinds:
        for kind in rng.sample(kinds, len(kinds)):
            at += rng.uniform(*pace.pause)
            duration = rng.uniform(*(STALL_SECONDS if kind == STALL else pace.duration))
            if at + duration > seconds:
                return
            yield Fault(at, kind, duration, rng.random())
            at += duration
