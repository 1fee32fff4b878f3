"""An order for the load generator, the resulting turn, and the process that executes it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools import ROOT

# Seconds for connecting, for a warm-up, and for the last replies of a turn.
TIMEOUT = 20.0


@dataclass(frozen=True)
class Order:
    """The load to generate; the turn ends after `count` replies or `seconds`.

    The first `warm_up` replies are not counted. `pids` are the processes whose CPU is counted.

    Workers race for connections. Measured with 8 callers and 2 workers, in one of five turns a
    worker got all callers, and a reply cost 40 percent more. So callers reconnect, a limited number
    of times, until each of `workers` processes uses at least `evenness` times an equal share of the
    warm-up's CPU.
    """

    port: int
    path: str
    callers: int
    warm_up: int
    count: int = sys.maxsize
    seconds: float = 60.0
    pids: Sequence[int] = ()
    workers: int = 1
    evenness: float = 0.0
    trace: bool = False  # whether to count system calls, which slows the processes down


@dataclass
class Turn:
    """The result of an order; any status but 200 and 503 is an error, even in the warm-up."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds
    latencies: list[float] = field(default_factory=list)  # of the 200s, in milliseconds
    refused: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    voluntary: int = 0  # context switches
    involuntary: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # system calls, if the order says `trace`
    problem: str = ""  # why they were not counted


def take_turn(order: Order) -> Turn:
    """Execute an order in a process of its own.

    Raises:
        subprocess.SubprocessError: the process failed or took too long.
    """
    (turn,) = _in_process([order], 0, order.seconds)
    return Turn(**turn)


def take_turns(orders: Sequence[Order], rounds: int) -> list[list[Turn]]:
    """Run `rounds` bursts of the orders in turn, in one process; return each order's bursts.

    Raises:
        subprocess.SubprocessError: the process failed or took too long.
    """
    seconds = rounds * sum(order.seconds for order in orders)
    bursts = _in_process(orders, rounds, seconds)
    return [[Turn(**turn) for turn in turns] for turns in bursts]


def _in_process(orders: Sequence[Order], rounds: int, seconds: float) -> list[Any]:
    arguments = json.dumps({"orders": [asdict(order) for order in orders], "rounds": rounds})
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.load", arguments],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C must not reach it
        timeout=seconds + 3 * TIMEOUT,
    )
    answer: list[Any] = json.loads(done.stdout)
    return answer
