"""What fails, when and for how long: the same for the same seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tools.chaos.providers import ACCEPTS, BEHAVIOURS

PROCESSES = ("kill a worker", "reload")
DATABASE = (
    "PostgreSQL killed",
    "PostgreSQL hangs",
    "PostgreSQL stopped",
    "PostgreSQL does not accept",
)
ROWS = ("reorder rows", "remove a row", "add a row", "replace a URL")
HOSTILE = tuple(name for name in BEHAVIOURS if name != ACCEPTS)


class Fault(NamedTuple):
    """What fails, at which second of the chaos, for how many seconds; `choice` says which one."""

    at: float
    kind: str
    seconds: float
    choice: float  # from 0 up to, and without, 1


@dataclass(frozen=True, slots=True)
class Kinds:
    """What may fail."""

    processes: Sequence[str] = PROCESSES
    database: Sequence[str] = (*DATABASE, *ROWS)
    providers: Sequence[str] = HOSTILE

    def all(self) -> frozenset[str]:
        """Return all of them."""
        return frozenset((*self.processes, *self.database, *self.providers))


EVERYTHING = Kinds()


class Pace(NamedTuple):
    """Shortest and longest: seconds between the faults of a track, and how long one lasts."""

    pause: tuple[float, float]
    lasting: tuple[float, float]


PROCESSES_PACE = Pace((2.0, 8.0), (0.0, 0.0))
DATABASE_PACE = Pace((0.5, 2.0), (0.5, 3.5))
PROVIDER_PACE = Pace((0.5, 3.0), (0.5, 2.5))

# Of the time. What is left is for the last workers: a new one has leaked nothing.
PROCESSES_SHARE = 2 / 3

Track = tuple[Fault, ...]


class Schedule(NamedTuple):
    """Tracks that run at the same time: a fault of one begins when its last one has ended."""

    processes: Track
    database: Track
    providers: tuple[Track, ...]  # each provider's


def plan(seed: int, seconds: float, providers: int, kinds: Kinds) -> Schedule:
    """Return what fails within so many seconds."""
    rng = random.Random(seed)  # noqa: S311 it is to be repeated, not to be a secret

    def track(kinds: Sequence[str], pace: Pace, share: float = 1.0) -> Track:
        return tuple(_track(rng, share * seconds, kinds, pace))

    return Schedule(
        track(kinds.processes, PROCESSES_PACE, PROCESSES_SHARE),
        track(kinds.database, DATABASE_PACE),
        tuple(track(kinds.providers, PROVIDER_PACE) for _ in range(providers)),
    )


def _track(rng: random.Random, seconds: float, kinds: Sequence[str], pace: Pace) -> Iterator[Fault]:
    """Yield every kind once, in any order, then again, until the time is over."""
    at = 0.0
    while kinds:
        for kind in rng.sample(kinds, len(kinds)):
            at += rng.uniform(*pace.pause)
            lasts = rng.uniform(*pace.lasting)
            if at + lasts > seconds:
                return
            yield Fault(at, kind, lasts, rng.random())
            at += lasts
