"""The figures of turns: medians over rounds, ratios within a round, and the goals."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tools.bench.turns import Turn

# Above this share of busy CPUs, the machine itself limits the throughput.
CPU_LIMIT = 0.9


class Figures(NamedTuple):
    """A turn's figures, in the units of the tables."""

    cpu: float  # microseconds per reply
    rate: float  # replies per second
    p50: float  # milliseconds
    p99: float
    refused: int
    busy: float  # the share of the machine's CPUs that all processes used
    voluntary: float = 0.0  # context switches per reply; 0 where they cannot be counted
    involuntary: float = 0.0


NO_FIGURES = Figures(0, 0, 0, 0, 0, 0)


PERCENTILES: dict[str, Callable[[Figures], float]] = {
    "p50": lambda one: one.p50,
    "p99": lambda one: one.p99,
}


class Point(NamedTuple):
    """A stack's figures under a load; providers answer after `delay` milliseconds."""

    stack: str
    workers: int
    threads: int
    delay: int
    callers: int = 0
    figures: Figures = NO_FIGURES

    def measured(self, callers: int, result: Figures) -> "Point":
        """Return the point with its callers and figures."""
        return self._replace(callers=callers, figures=result)


class Spread(NamedTuple):
    """A median and its quartiles."""

    low: float
    median: float
    high: float


class Compared(NamedTuple):
    """Ratios of CPU: their median and quartiles, and the median's confidence interval."""

    ratio: Spread
    between: tuple[float, float]  # the true median, with 95 percent confidence
    rounds: int


class Memory(NamedTuple):
    """A service's megabytes after a number of notifications."""

    notifications: int
    workers: float
    total: float


class Summary(NamedTuple):
    """A row of the main table: medians, CPU relative to the bare stack's, and megabytes."""

    figures: Figures
    to_bare: Spread
    memory: float


class Goal(NamedTuple):
    """A bound and the measured value, which is None if it could not be measured."""

    name: str
    bound: float
    measured: float | None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """The verdict in a word or two."""
        if self.measured is None:
            return "not measured"
        within = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "met" if within else "NOT MET"


def figures(turn: Turn, busy: float = 0.0) -> Figures:
    """Return the figures of a turn with at least one reply."""
    replies = len(turn.latencies)
    return Figures(
        cpu=1e6 * turn.cpu / replies,
        rate=replies / turn.seconds,
        p50=percentile(turn.latencies, 50),
        p99=percentile(turn.latencies, 99),
        refused=turn.refused,
        busy=busy,
        voluntary=turn.voluntary / replies,
        involuntary=turn.involuntary / replies,
    )


def percentile(values: Sequence[float], rank: int) -> float:
    """Return the smallest value that at least `rank` percent of the values do not exceed."""
    return sorted(values)[-(-rank * len(values) // 100) - 1]


def spread(values: Iterable[float]) -> Spread:
    """Return the median and the quartiles of the values."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return Spread(*(3 * ordered))
    return Spread(*statistics.quantiles(ordered, n=4, method="inclusive"))


def ratio(
    ours: Sequence[Figures],
    theirs: Sequence[Figures],
    of: Callable[[Figures], float] = lambda one: one.cpu,
) -> Spread:
    """Compare two rows round by round: other load on the machine slows both alike."""
    return spread(of(one) / of(other) for one, other in zip(ours, theirs, strict=True))


def compared(ours: Sequence[Figures], theirs: Sequence[Figures]) -> Compared:
    """Compare the CPU of two rows round by round, with a confidence interval of the median."""
    ordered = sorted(one.cpu / other.cpu for one, other in zip(ours, theirs, strict=True))
    count = len(ordered)
    # The number of ratios below the true median has a binomial distribution.
    least = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    return Compared(spread(ordered), (ordered[least], ordered[-1 - least]), count)


def median(rounds: Iterable[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*(statistics.median(values) for values in zip(*rounds, strict=True)))


def main_goals(rows: Mapping[str, Sequence[Figures]]) -> list[Goal]:
    """Judge the CPU of a notification."""
    bounds = (
        ("notifier, buyer", "bare", 1.10),
        ("notifier, buyer", "naive", 0.70),
        ("notifier, buyer", "FastAPI + httpx", 0.45),
        ("notifier, buyer", "FastAPI + httpx, uvloop", 0.55),
        ("notifier, seller", "notifier, buyer", 1.75),
        ("notifier, breaker open", "notifier, buyer", 1.03),
    )
    return [
        Goal(f"CPU: {ours} / {theirs}", bound, ratio(rows[ours], rows[theirs]).median)
        for ours, theirs, bound in bounds
    ]


def capacity_goals(points: Iterable[Point]) -> list[Goal]:
    """Judge the lowest throughput that the machine's CPUs did not limit."""
    shares = [
        point.figures.rate * point.delay / 1000 / (point.threads * point.workers)
        for point in points
        if point.figures.busy < CPU_LIMIT
    ]
    worst = min(shares, default=None)
    return [Goal("throughput / (threads x workers / 0.1 s)", 0.95, worst, at_least=True)]


def latency_goals(points: Mapping[str, Point]) -> list[Goal]:
    """Judge a seller's latency beyond a buyer's at the slower channel, and the tail latency."""
    seller, buyer, many = (points[name].figures for name in ("seller", "buyer", "buyers"))
    return [
        *(
            Goal(f"seller {name} - slower channel's, ms", 3.0, of(seller) - of(buyer))
            for name, of in PERCENTILES.items()
        ),
        Goal("p99 / p50 below saturation", 1.3, many.p99 / many.p50),
    ]


def memory_goals(samples: Sequence[Memory]) -> list[Goal]:
    """Judge the last sample, and the growth in the second half."""
    half, last = samples[len(samples) // 2], samples[-1]
    return [
        Goal(
            f"memory of two workers after {last.notifications} notifications, MB",
            90.0,
            last.workers,
        ),
        Goal(f"the same / after {half.notifications}", 1.02, last.workers / half.workers),
    ]
