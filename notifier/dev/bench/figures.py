"""What the turns say: medians over rounds, ratios within a round, goals, tables."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from notifier.dev.bench.load import Turn


class Figures(NamedTuple):
    """A turn in the units of the tables."""

    cpu: float  # microseconds a reply
    rate: float  # replies a second
    p50: float  # milliseconds
    p99: float
    refused: int


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float


def figures(turn: Turn) -> Figures:
    """Return what a turn with at least one reply says."""
    replies = len(turn.latencies)
    return Figures(
        cpu=1e6 * turn.cpu / replies,
        rate=replies / turn.seconds,
        p50=percentile(turn.latencies, 50),
        p99=percentile(turn.latencies, 99),
        refused=turn.refused,
    )


def percentile(values: Sequence[float], rank: int) -> float:
    """Return the smallest value that `rank` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-rank * len(ordered) // 100) - 1)]


def spread(values: Iterable[float]) -> Spread:
    """Return median and quartiles; of one value that value."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return Spread(*(3 * ordered))
    return Spread(*statistics.quantiles(ordered, n=4, method="inclusive"))


def ratios(
    ours: Sequence[Figures], theirs: Sequence[Figures], of: Callable[[Figures], float]
) -> Spread:
    """Compare two rows round by round: what slows the machine slows both."""
    return spread(of(one) / of(other) for one, other in zip(ours, theirs, strict=True))


def median(rounds: Iterable[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*(statistics.median(values) for values in zip(*rounds, strict=True)))


class Goal(NamedTuple):
    """A bound, and what was measured."""

    name: str
    bound: float
    measured: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Say whether what was measured is within the bound."""
        if self.at_least:
            return self.measured >= self.bound
        return self.measured <= self.bound


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; its first column is text, the others are figures."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in cells)} |" for cells in lines)
