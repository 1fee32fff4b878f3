"""`make bench`: compare the service's cost with other stacks, as text, JSON and a plot.

Starts everything that it needs, on loopback and in separate processes. The exit code is 1 if a
measurement failed or a reply was wrong. The report says which goals are met.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tools import ROOT, rig
from tools.bench import parts, report, stacks
from tools.bench.figures import Goal
from tools.bench.plan import QUICK, Bench, Plan
from tools.dev import postgres


def main() -> int:
    """Print the report; return the exit code."""
    arguments = _arguments()
    return rig.exit_code("make bench", lambda: _bench(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    plan = QUICK if arguments.quick else Plan()
    plan = plan._replace(rounds=arguments.rounds or plan.rounds)
    with ExitStack() as stack:
        server = postgres.acquire(ephemeral=True)
        stack.callback(server.close)
        urls = stack.enter_context(stacks.sink())
        bench = Bench(plan, server, urls, arguments.beside)
        run(bench, arguments.only or [*parts.PARTS], arguments.to)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.bench")
    parser.add_argument("--quick", action="store_true", help="measure less, and less precisely")
    parser.add_argument(
        "--only",
        action="append",
        choices=parts.PARTS,
        metavar="PART",
        help=(f"measure only this part: {', '.join(parts.PARTS)}; may be repeated"),
    )
    parser.add_argument("--rounds", type=int, help="rounds of the main table")
    parser.add_argument(
        "--beside",
        type=checkout,
        metavar="CHECKOUT",
        help="compare one worker with that of another checkout; other parts run only with --only",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help=(
            "write bench.json and bench.png, or beside.json, to this folder; "
            "default: docs, or none with --quick, --only or --beside"
        ),
    )
    arguments = parser.parse_args()
    if arguments.beside and not arguments.only:
        arguments.only = ["worker"]
    if not (arguments.to or arguments.quick or arguments.only):
        arguments.to = ROOT / "docs"
    return arguments


def checkout(text: str) -> Path:
    """Return the folder of a checkout, for a command line."""
    path = Path(text).resolve()
    if not (path / "gunicorn.conf.py").exists():
        raise argparse.ArgumentTypeError(f"{path} has no gunicorn.conf.py")
    return path


def run(bench: Bench, names: list[str], folder: Path | None) -> None:
    """Measure these parts, and print each as soon as it is done."""
    about = report.machine()
    if bench.beside:
        about += f"; {report.compared(bench.beside)}"
    print(about)
    if bench.plan.replies < Plan().replies and not bench.beside:
        print("Quick: these figures only show that everything works.")
    measured: dict[str, Any] = {}
    goals: list[Goal] = []
    for name in names:
        measured[name] = parts.PARTS[name](bench)
        print(file=sys.stderr)
        part = report.PARTS[name]
        print(f"\n{part.title}:\n\n{part.show(measured[name])}", flush=True)
        goals += part.judge(measured[name])
    print(f"\n{report.goals_table(goals)}")
    if folder:
        name = "beside.json" if bench.beside else "bench.json"
        report.write(folder / name, measured, goals, about)
        if {"main", "scaling"} <= measured.keys():
            from tools.bench import plot  # noqa: PLC0415 needs matplotlib

            plot.draw(folder / "bench.png", measured["main"], measured["scaling"])
        print(f"\nwritten to {folder}")


if __name__ == "__main__":
    sys.exit(main())
