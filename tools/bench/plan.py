"""How much to measure; and a turn, in which one stack has callers and all others are idle."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tools import ROOT
from tools.bench import stacks
from tools.bench.figures import Figures, figures
from tools.bench.stacks import Stack
from tools.bench.turns import Order, Turn, take_turn, take_turns
from tools.dev import postgres
from tools.rig import CannotMeasure, Environment, path_of

BUYER, SELLER = path_of("buyer"), path_of("seller")


class Plan(NamedTuple):
    """How much to measure."""

    rounds: int = 19
    replies: int = 800  # per row and round of the main table
    seconds: float = 2.0  # per turn of the other parts
    workers: tuple[int, ...] = (1, 2, 4)
    callers: tuple[int, ...] = (1, 4, 16, 64, 256)
    notifications: int = 100_000
    starts: int = 8  # of the one-worker services
    bursts: int = 12  # per case and start


QUICK = Plan(
    rounds=5,
    replies=300,
    seconds=0.7,
    workers=(1, 2),
    callers=(1, 16, 256),
    notifications=10_000,
    starts=4,
    bursts=10,
)


@dataclass(frozen=True)
class Bench:
    """Shared by all parts; `beside` is another checkout of the project, to compare ours with."""

    plan: Plan
    server: postgres.Server
    urls: dict[str, str]
    beside: Path | None = None

    def database(self, email: str, push: str, checkout: Path = ROOT) -> Environment:
        """Create a checkout's database with one provider per channel; return its `DB_*`."""
        return stacks.database(self.server, [self.urls[email]], self.urls[push], checkout)

    def service(self, email: str, push: str, **how: Any) -> Any:
        """Run the service with one provider per channel."""
        return stacks.service(self.database(email, push), **how)


def take(stack: Stack, path: str, callers: int, warm_up: int, **bounds: Any) -> Figures:
    """Take a turn and return its figures.

    Raises:
        CannotMeasure: a reply was wrong, or there was none.
    """
    psutil.cpu_percent()
    turn = checked_turn(stack, path, callers, warm_up, **bounds)
    return figures(turn, busy=psutil.cpu_percent() / 100)


def checked_turn(stack: Stack, path: str, callers: int, warm_up: int, **bounds: Any) -> Turn:
    """Take a turn; `bounds` are the other fields of its `Order`.

    Raises:
        CannotMeasure: a reply was wrong, or there was none.
    """
    turn = take_turn(Order(stack.port, path, callers, warm_up, **{"pids": stack.pids()} | bounds))
    _check([turn])
    return turn


def checked_bursts(orders: Sequence[Order], rounds: int) -> list[list[Figures]]:
    """Run bursts of the orders in turn; return the figures of each order's bursts.

    Raises:
        CannotMeasure: a reply was wrong, or there was none.
    """
    bursts = take_turns(orders, rounds)
    _check([turn for turns in bursts for turn in turns])
    return [[figures(turn) for turn in turns] for turns in bursts]


def _check(turns: Sequence[Turn]) -> None:
    for turn in turns:
        if turn.errors or not turn.latencies:
            replies = len(turn.latencies)
            raise CannotMeasure(f"{replies} replies were correct; errors: {turn.errors}")
    print(".", end="", file=sys.stderr, flush=True)
