"""`make pressure`: put the service under outside pressure, alone or beside another checkout.

Starts everything that it needs, on loopback and in separate processes. The exit code is 1 if this
checkout misses a goal. The other checkout gets the same pressure from this checkout's tools.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from notifier.settings import available_cpus
from tools import ROOT, rig
from tools.bench import stacks
from tools.bench.__main__ import checkout
from tools.dev import postgres
from tools.machine import MEMORY
from tools.pressure import callers, cost, machine
from tools.pressure.stand import Row, Scenario, Stand

SCENARIOS = {
    "silent": Scenario("5,000 callers send nothing, 4 workers", callers.silent),
    "half-bodies": Scenario("280 callers send half a body, 4 workers", callers.half_bodies),
    "greedy": Scenario("600 greedy callers, 2 workers", callers.greedy_fast),
    "greedy-slow": Scenario(
        "600 greedy callers, 2 workers, a provider at 50 ms", callers.greedy_slow
    ),
    "expect": Scenario("Expect: 100-continue", callers.expect),
    "memory": Scenario(f"{MEMORY} is full, 2 workers", machine.full_memory),
    "log": Scenario("nobody reads the log, 2 workers", machine.stalled_log),
    "1024-files": Scenario("1,024 descriptors, 985 idle callers", machine.descriptors_1024),
    "256-files": Scenario("256 descriptors, 217 idle callers", machine.descriptors_256),
    "outage": Scenario("PostgreSQL is stopped, 2 workers", machine.outage),
    "log-line": Scenario("a log line", cost.log_line),
    "address": Scenario("a body of a request", cost.address),
}

NOT_MEASURED = "not measured"


def main() -> int:
    """Print the table; return the exit code."""
    arguments = _arguments()
    return rig.exit_code("make pressure", lambda: _pressure(arguments))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.pressure")
    parser.add_argument(
        "--beside",
        type=checkout,
        metavar="CHECKOUT",
        help="put another checkout of the project under the same pressure",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=SCENARIOS,
        metavar="SCENARIO",
        help=f"run only this scenario: {', '.join(SCENARIOS)}; may be repeated",
    )
    return parser.parse_args()


def _pressure(arguments: argparse.Namespace) -> int:
    folders = [arguments.beside, ROOT] if arguments.beside else [ROOT]
    names = ["beside", "this tree"] if arguments.beside else ["figure"]
    with ExitStack() as stack:
        server = postgres.acquire(ephemeral=True)
        stack.callback(server.close)
        urls = stack.enter_context(stacks.sink())
        stands = [Stand(folder, server, urls) for folder in folders]
        print(f"{_machine()}\n\n{_line('pressure', 'measured', 'goal', *names)}")
        print("|---|---|--:|" + "---|" * len(names), flush=True)
        missed = [_run(SCENARIOS[name], stands) for name in arguments.only or SCENARIOS]
    return 1 if any(missed) else 0


def _machine() -> str:
    busy = f"load average {os.getloadavg()[0]:.1f}"
    return f"{available_cpus()} CPUs, {busy}, {platform.system()}, {platform.python_version()}"


def _run(scenario: Scenario, stands: Sequence[Stand]) -> bool:
    """Print a row for each figure of a scenario; return True if the last stand misses a goal."""
    measured = [_rows(scenario, stand) for stand in stands]
    last = {row.measured: row for row in measured[-1]}
    for name, row in ({row.measured: row for rows in measured for row in rows} | last).items():
        cells = [_cell(name, rows) for rows in measured]
        print(_line(scenario.pressure, name, row.goal, *cells), flush=True)
    return any(row.met is False for row in measured[-1])


def _rows(scenario: Scenario, stand: Stand) -> list[Row]:
    try:
        return [*scenario.measure(stand)]
    except rig.FAILURES as error:
        return [Row(NOT_MEASURED, "", str(error), met=False)]


def _cell(measured: str, rows: Sequence[Row]) -> str:
    """Return the figure, marked if it misses the goal."""
    for row in rows:
        if row.measured == measured:
            return f"{row.figure}{', NOT MET' if row.met is False else ''}"
    return ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
