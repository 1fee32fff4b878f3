"""The cost of a notification in one worker, alone or compared with that of another checkout.

    git worktree add /tmp/before ca111bc
    make bench BESIDE=/tmp/before QUICK=1
    make bench BESIDE=/tmp/before            # slower, and more precise

or `python -m tools.bench --beside /tmp/before [--quick]`.

Both services run at once, with this Python and one worker each. One process calls both: bursts of
requests alternate between the services, so that other load on the machine slows both alike. The
workers' CPU time, user and system, is compared burst by burst; the result is the median ratio.

Processes with the same code differ by up to a tenth, so the services are started several times.
With the same code on both sides, quick runs gave ratios from 0.98 to 1.07. The goals apply to a
comparison with commit ca111bc; ignore them for any other. System calls are counted last, because
strace slows a process so much that every other figure would be wrong.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

from tools import ROOT
from tools.bench.figures import Compared, Figures, Goal, compared, median
from tools.bench.plan import Bench, checked_bursts, checked_turn
from tools.bench.stacks import Stack, service
from tools.bench.turns import Order
from tools.rig import path_of

OURS, THEIRS = "this tree", "beside"


class Case(NamedTuple):
    """The recipient, and the number of callers."""

    recipient: str
    callers: int

    @property
    def path(self) -> str:
        """The path that callers post to."""
        return path_of(self.recipient)

    @property
    def name(self) -> str:
        """The name of the case in the tables."""
        return f"{self.recipient}, {self.callers} caller{'s'[: self.callers > 1]}"


# Many callers come last: the threads that they need stay for a while, and cost a little.
CASES = tuple(
    Case(recipient, callers) for callers in (1, 8, 64) for recipient in ("buyer", "seller")
)

# The most CPU that a case may use, as a multiple of commit ca111bc's.
BOUNDS = {
    Case("buyer", 1): 0.65,
    Case("buyer", 8): 0.65,
    Case("seller", 8): 0.80,
    Case("buyer", 64): 0.80,
}

# Replies per burst: for each caller, and at least.
BURST_EACH, BURST = 3, 80

# Traced notifications: for each caller, and at least.
TRACED_EACH, TRACED = 10, 200

# strace makes threads wait for each other, and so multiplies this call by up to 17. The voluntary
# switches show how often threads wait for each other without strace.
DISTORTED = "futex"


class Work(NamedTuple):
    """A checkout's figures for each burst, and its system calls per notification by name.

    `problem` says why the system calls were not counted.
    """

    bursts: list[Figures]
    calls: dict[str, float]
    problem: str = ""

    def summary(self) -> dict[str, object]:
        """Return the medians and calls for the JSON file."""
        return {
            "figures": median(self.bursts),
            "calls_but_futex": sum(self.calls.values()) or None,
            "calls_by_name": self.calls,
            "problem": self.problem,
        }


Works = Mapping[str, Mapping[str, Work]]  # by case and checkout


def measure_worker(bench: Bench) -> Works:
    """Measure all cases; in a comparison with another checkout, only those that have a bound."""
    checkouts = {OURS: ROOT} | ({THEIRS: bench.beside} if bench.beside else {})
    databases = {side: bench.database("fast", "fast", path) for side, path in checkouts.items()}
    cases = [*BOUNDS] if bench.beside else CASES
    bursts: dict[Case, dict[str, list[Figures]]] = {
        case: {side: [] for side in checkouts} for case in cases
    }
    for start in range(bench.plan.starts):
        with ExitStack() as stack:
            # Alternate which checkout is started first and called first.
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
    return dict(zip(sides, checked_bursts(orders, rounds), strict=True))


def _calls(sides: dict[str, Stack], case: Case) -> dict[str, tuple[dict[str, float], str]]:
    """Count system calls; return their number per notification by name, and any problem."""
    counted = {}
    for side, stack in sides.items():
        count = max(TRACED, TRACED_EACH * case.callers)
        bounds = {"count": count, "pids": stack.workers(), "trace": True}
        turn = checked_turn(stack, case.path, case.callers, case.callers, **bounds)
        replies = len(turn.latencies)
        names = turn.calls.keys() - {DISTORTED}
        calls = {name: turn.calls[name] / replies for name in sorted(names)}
        counted[side] = calls, turn.problem
    return counted


def ratios(works: Works) -> dict[str, Compared]:
    """Return our CPU relative to the other checkout's, by case; empty without another checkout."""
    return {
        case: compared(sides[OURS].bursts, sides[THEIRS].bursts)
        for case, sides in works.items()
        if THEIRS in sides
    }


def worker_goals(works: Works) -> list[Goal]:
    """Judge our CPU relative to the other checkout's, which should be commit ca111bc."""
    measured = ratios(works)
    return [
        Goal(f"CPU: {case.name} / {THEIRS}", bound, measured[case.name].ratio.median)
        for case, bound in BOUNDS.items()
        if case.name in measured
    ]
