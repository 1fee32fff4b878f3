"""What one worker does for a notification; and the same in another checkout, turn by turn.

    git worktree add /tmp/before ca111bc
    make bench BESIDE=/tmp/before        # or: python -m tools.bench --beside /tmp/before
    make bench BESIDE=/tmp/before QUICK=1

Both services run at once, with this Python and with one worker each. Callers take turns at them:
each round asks both, the first of the last round second. So whatever slows the machine down slows
both. CPU time is compared within a round; the result is the median of the rounds' ratios.
Turns that count system calls come last: strace slows a process so much that nothing else counts.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from tools.bench.figures import Figures, Goal, Spread, median, ratio
from tools.bench.load import ROOT
from tools.bench.plan import BUYER, SELLER, Bench, right_turn, take
from tools.bench.stacks import Stack

OURS, THEIRS = "this tree", "beside"


class Case(NamedTuple):
    """Who is notified, and by how many callers."""

    recipient: str
    callers: int

    @property
    def path(self) -> str:
        """Return where callers post."""
        return {"buyer": BUYER, "seller": SELLER}[self.recipient]

    @property
    def name(self) -> str:
        """Return what the tables call it."""
        return f"{self.recipient}, {self.callers} caller{'s'[: self.callers > 1]}"


# More callers come later: the threads that they need stay, and cost a little.
CASES = tuple(
    Case(recipient, callers) for callers in (1, 8, 64) for recipient in ("buyer", "seller")
)

# The most CPU, as a multiple of what commit ca111bc used.
BOUNDS = {
    Case("buyer", 1): 0.65,
    Case("buyer", 8): 0.65,
    Case("seller", 8): 0.80,
    Case("buyer", 64): 0.80,
}

# So many notifications are traced for each caller, at the least and at the most.
TRACED_EACH, TRACED = 10, 200


class Work(NamedTuple):
    """A checkout's figures, round by round, and its system calls per notification by name.

    `problem` says why the calls were not counted.
    """

    rounds: list[Figures]
    calls: dict[str, float]
    problem: str = ""

    def summary(self) -> dict[str, object]:
        """Return medians, as the JSON has them."""
        return {
            "figures": median(self.rounds),
            "calls": sum(self.calls.values()) or None,
            "calls_by_name": self.calls,
            "problem": self.problem,
        }


Works = Mapping[str, Mapping[str, Work]]  # by case and checkout


def measure_worker(bench: Bench) -> Works:
    """Measure all cases; with another checkout beside ours, those that have a bound."""
    checkouts = {OURS: ROOT} | ({THEIRS: bench.beside} if bench.beside else {})
    cases = BOUNDS if bench.beside else CASES
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(bench.service("fast", "fast", checkout=path, workers=1))
            for name, path in checkouts.items()
        }
        rounds = {case: _rounds(bench, sides, case) for case in cases}
        return {
            case.name: {name: Work(taken[name], *_calls(sides[name], case)) for name in sides}
            for case, taken in rounds.items()
        }


def _rounds(bench: Bench, sides: dict[str, Stack], case: Case) -> dict[str, list[Figures]]:
    """Take turns; the first round is not counted."""
    taken: dict[str, list[Figures]] = {name: [] for name in sides}
    count = bench.plan.turn
    for number in range(bench.plan.turns + 1):
        for name in [*sides][:: 1 if number % 2 else -1]:
            stack = sides[name]
            one = take(
                stack, case.path, case.callers, count // 8, count=count, pids=stack.workers()
            )
            taken[name] += [one] if number else []
    return taken


def _calls(stack: Stack, case: Case) -> tuple[dict[str, float], str]:
    """Count the system calls of a turn; return how many a notification took, and what failed."""
    count = max(TRACED, TRACED_EACH * case.callers)
    bounds = {"count": count, "pids": stack.workers(), "trace": True}
    turn = right_turn(stack, case.path, case.callers, case.callers, **bounds)
    replies = len(turn.latencies)
    return {name: calls / replies for name, calls in turn.calls.items()}, turn.problem


def ratios(works: Works) -> dict[str, Spread]:
    """Return by case our CPU as a multiple of the other checkout's; empty without one."""
    return {
        case: ratio(sides[OURS].rounds, sides[THEIRS].rounds)
        for case, sides in works.items()
        if THEIRS in sides
    }


def worker_goals(works: Works) -> list[Goal]:
    """Judge the CPU beside that of the other checkout, which is meant to be ca111bc."""
    measured = ratios(works)
    return [
        Goal(f"CPU: {case.name} / {THEIRS}", bound, measured[case.name].median)
        for case, bound in BOUNDS.items()
        if case.name in measured
    ]
