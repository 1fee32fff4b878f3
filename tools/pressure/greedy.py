"""Callers that send their next notification at once after each reply, in a process of their own.

    python -m tools.pressure.greedy ORDER    # JSON with the arguments of `run`; prints a Harvest

They keep their connections, and do not respect `Retry-After`. The process ends with its standard
input, or earlier if the order says so.
"""

import json
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tools import ROOT
from tools.bench.load import Caller, request_to
from tools.rig import CannotMeasure, path_of

FOREVER, UNLIMITED = 600.0, 10**9


@dataclass(frozen=True)
class Harvest:
    """The number of replies by status, 0 for a connection that ended; times are in seconds."""

    statuses: dict[str, int]
    seconds: float
    slowest: float

    def text(self) -> str:
        """Return the replies per second by status."""
        rates = {name: count / self.seconds for name, count in sorted(self.statuses.items())}
        return ", ".join(f"{name}: {rate:.0f}" for name, rate in rates.items())


class Greedy:
    """The callers of a process, and their replies."""

    def __init__(self, port: int, callers: int) -> None:
        self._statuses = Counter[str]()
        self._slowest = 0.0
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._callers = [Caller(port, request_to(path_of("buyer"))) for _ in range(callers)]

    def run(self, most: int, seconds: float) -> Harvest:
        """Send `most` requests; end with their replies, after `seconds`, or with the input."""
        began = time.perf_counter()
        unsent = most - len(self._callers)
        for caller in self._callers:
            self._selector.register(caller.sock, selectors.EVENT_READ, caller)
            caller.send()
        while (left := began + seconds - time.perf_counter()) > 0 and not self._ended(left, most):
            for caller in self._answered:
                if unsent > 0:
                    caller.send()
                    unsent -= 1
        return Harvest(dict(self._statuses), time.perf_counter() - began, self._slowest)

    def _ended(self, wait: float, most: int) -> bool:
        """Take the replies that are there; return True once there is nothing to wait for."""
        self._answered: list[Caller] = []
        for key, _ in self._selector.select(wait):
            if key.fileobj is sys.stdin:
                return True
            if reply := key.data.read():
                self._take(key.data, *reply)
        return self._statuses.total() >= most

    def _take(self, caller: Caller, status: int, kept: bool) -> None:
        self._statuses[str(status)] += 1
        self._slowest = max(self._slowest, time.perf_counter() - caller.began)
        self._answered.append(caller)
        if not kept:
            self._selector.unregister(caller.sock)
            caller.sock.close()
            caller.connect()
            self._selector.register(caller.sock, selectors.EVENT_READ, caller)


def burst(port: int, callers: int, most: int, seconds: float) -> Harvest:
    """Send `most` notifications, and return the replies of the first `seconds`."""
    with _process(port, callers, most, seconds) as process:
        return _harvest(process)


@contextmanager
def greedy(port: int, callers: int) -> Iterator[list[Harvest]]:
    """Call during the block; the yielded list has the harvest after it."""
    harvests: list[Harvest] = []
    with _process(port, callers, UNLIMITED, FOREVER) as process:
        yield harvests
        if process.stdin:
            process.stdin.close()
        harvests.append(_harvest(process))


def _process(*order: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tools.pressure.greedy", json.dumps(order)],
        cwd=ROOT,
        stdin=subprocess.PIPE,  # closing it stops the process
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C must not reach it
    )


def _harvest(process: "subprocess.Popen[str]") -> Harvest:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise CannotMeasure("the greedy callers have failed, see above")
    return Harvest(**json.loads(line))


def main(port: int, callers: int, most: int, seconds: float) -> None:
    """Call, and print the harvest."""
    print(json.dumps(asdict(Greedy(port, callers).run(most, seconds))), flush=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
