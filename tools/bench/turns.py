"""An order to callers, the turn that came of it, and the process that carries it out."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools import ROOT

# Nothing for so long, and the turn ends.
PATIENCE = 20.0


@dataclass(frozen=True)
class Order:
    """What to do: where, by how many callers, until `count` replies or for `seconds`.

    `warm_up` replies come first and are not counted. `pids` are the processes whose CPU is.

    Workers race for connections; measured with 8 callers and 2 workers, in one of five turns one
    worker got all, and a reply cost 40 percent more. So, if possible, each of `workers` processes
    has, of what an equal share of the warm-up's CPU would be, at least `evenness`.
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
    trace: bool = False  # count system calls, which slows the processes down


@dataclass
class Turn:
    """What came of it; every other status than 200 and 503 is an error, during the warm-up too."""

    seconds: float = 0.0
    cpu: float = 0.0  # seconds
    latencies: list[float] = field(default_factory=list)  # of the 200s, in milliseconds
    refused: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    voluntary: int = 0  # context switches
    involuntary: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # system calls, if they were to be counted
    problem: str = ""  # why they were not


def take_turn(order: Order) -> Turn:
    """Carry out an order in a process of its own.

    Raises:
        subprocess.SubprocessError: it could not, or took too long.
    """
    (turn,) = _in_process([order], 0, order.seconds)
    return Turn(**turn)


def take_turns(orders: Sequence[Order], rounds: int) -> list[list[Turn]]:
    """Let orders have bursts in turn, in a process that is theirs; return those of each.

    Raises:
        subprocess.SubprocessError: it could not, or took too long.
    """
    seconds = rounds * sum(order.seconds for order in orders)
    bursts = _in_process(orders, rounds, seconds)
    return [[Turn(**turn) for turn in turns] for turns in bursts]


def _in_process(orders: Sequence[Order], rounds: int, seconds: float) -> list[Any]:
    what = json.dumps({"orders": [asdict(order) for order in orders], "rounds": rounds})
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.load", what],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        start_new_session=True,  # out of reach of the terminal's Ctrl-C
        timeout=seconds + 3 * PATIENCE,
    )
    answer: list[Any] = json.loads(done.stdout)
    return answer
