"""What one worker does for a notification; and the same in another checkout, turn by turn.

    git worktree add /tmp/before ca111bc
    make bench BESIDE=/tmp/before QUICK=1
    make bench BESIDE=/tmp/before            # takes longer, and is more certain

or `python -m tools.bench --beside /tmp/before [--quick]`.

Both services run at once, with this Python and one worker each. One process has callers of both:
a burst of requests goes to one service, the next to the other, so other load slows both alike.
The CPU time of the worker, user and system, is compared burst by burst; the result is the median of
the ratios. Processes of the same code differ by up to a tenth, so the services start several times;
with the same code on both sides a quick run has said 0.98 to 1.07. The goals are meant for commit
ca111bc: ignore them beside another. System calls are counted last, for strace slows a process so
much that no other figure would be right.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from tools import ROOT
from tools.bench.figures import Compared, Figures, Goal, compared, median
from tools.bench.plan import Bench, right_bursts, right_turn
from tools.bench.stacks import Stack, service
from tools.bench.turns import Order
from tools.rig import path_of

OURS, THEIRS = "this tree", "beside"


class Case(NamedTuple):
    """Who is notified, and by how many callers."""

    recipient: str
    callers: int

    @property
    def path(self) -> str:
        """Return where callers post."""
        return path_of(self.recipient)

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

# Replies of a burst, for each caller and at the least.
BURST_EACH, BURST = 3, 80

# Notifications that are traced, for each caller and at the least.
TRACED_EACH, TRACED = 10, 200

# strace makes threads wait for each other, and so multiplies this call, by up to 17. How often
# threads wait for each other is seen in the voluntary switches.
DISTORTED = "futex"


class Work(NamedTuple):
    """A checkout's figures, burst by burst, and its system calls per notification by name.

    `problem` says why the calls were not counted.
    """

    bursts: list[Figures]
    calls: dict[str, float]
    problem: str = ""

    def summary(self) -> dict[str, object]:
        """Return medians, as the JSON has them."""
        return {
            "figures": median(self.bursts),
            "calls_but_futex": sum(self.calls.values()) or None,
            "calls_by_name": self.calls,
            "problem": self.problem,
        }


Works = Mapping[str, Mapping[str, Work]]  # by case and checkout


def measure_worker(bench: Bench) -> Works:
    """Measure all cases; with another checkout beside ours, those that have a bound."""
    checkouts = {OURS: ROOT} | ({THEIRS: bench.beside} if bench.beside else {})
    databases = {side: bench.database("fast", "fast", path) for side, path in checkouts.items()}
    cases = [*BOUNDS] if bench.beside else CASES
    bursts: dict[Case, dict[str, list[Figures]]] = {
        case: {side: [] for side in checkouts} for case in cases
    }
    for start in range(bench.plan.starts):
        with ExitStack() as stack:
            # Now the one is started first and asked first, now the other.
            sides = {
                side: stack.enter_context(service(database, workers=1, checkout=checkouts[side]))
                for side, database in [*databases.items()][:: -1 if start % 2 else 1]
            }
            for case in cases:
                for side, taken in _bursts(sides, case, bench.plan.bursts).items():
                    bursts[case][side] += taken
            if start == bench.plan.starts - 1:
                calls = {case: _calls(sides, case) for case in cases}
    return {
        case.name: {side: Work(bursts[case][side], *calls[case][side]) for side in checkouts}
        for case in cases
    }


def _bursts(sides: dict[str, Stack], case: Case, rounds: int) -> dict[str, list[Figures]]:
    orders = [
        Order(
            stack.port,
            case.path,
            case.callers,
            warm_up=BURST,
            count=max(BURST, BURST_EACH * case.callers),
            pids=stack.workers(),
        )
        for stack in sides.values()
    ]
    return dict(zip(sides, right_bursts(orders, rounds), strict=True))


def _calls(sides: dict[str, Stack], case: Case) -> dict[str, tuple[dict[str, float], str]]:
    """Count system calls; return how many a notification took by name, and what went wrong."""
    counted = {}
    for side, stack in sides.items():
        count = max(TRACED, TRACED_EACH * case.callers)
        bounds = {"count": count, "pids": stack.workers(), "trace": True}
        turn = right_turn(stack, case.path, case.callers, case.callers, **bounds)
        replies = len(turn.latencies)
        names = turn.calls.keys() - {DISTORTED}
        calls = {name: turn.calls[name] / replies for name in sorted(names)}
        counted[side] = calls, turn.problem
    return counted


def ratios(works: Works) -> dict[str, Compared]:
    """Compare by case our CPU with the other checkout's; empty without one."""
    return {
        case: compared(sides[OURS].bursts, sides[THEIRS].bursts)
        for case, sides in works.items()
        if THEIRS in sides
    }


def worker_goals(works: Works) -> list[Goal]:
    """Judge the CPU beside that of the other checkout, which is meant to be ca111bc."""
    measured = ratios(works)
    return [
        Goal(f"CPU: {case.name} / {THEIRS}", bound, measured[case.name].ratio.median)
        for case, bound in BOUNDS.items()
        if case.name in measured
    ]
