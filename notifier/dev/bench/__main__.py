"""`make bench`: the schedule of what is measured, and its report."""

import argparse
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any, NamedTuple

import psycopg

from notifier.dev import postgres
from notifier.dev.bench import stacks
from notifier.dev.bench.figures import Figures, Goal, figures, median, ratios, table
from notifier.dev.bench.load import Order, Turn, take_turn
from notifier.dev.bench.stacks import Stack
from notifier.dev.measure import CannotMeasure

NOTIFY = "/api/v1.0/recipient/{}/notify"
CALLERS = 8


class Row(NamedTuple):
    """A line of the main table."""

    stack: Stack
    path: str = NOTIFY.format("buyer")
    share: float = 1.0  # of the replies that others get


def take(stack: Stack, path: str, callers: int, warm_up: int, **bounds: Any) -> Figures:
    """Measure once.

    Raises:
        CannotMeasure: a reply was wrong, or none came.
    """
    order = Order(stack.port, path, callers, warm_up, pids=stack.pids(), **bounds)
    turn: Turn = take_turn(order)
    if turn.errors or not turn.latencies:
        raise CannotMeasure(f"port {stack.port}: {len(turn.latencies)} replies, {turn.errors}")
    return figures(turn)


def main_rows(stack: ExitStack, server: postgres.Server, urls: dict[str, str]) -> dict[str, Row]:
    """Start all that the main table compares."""
    fast, failing = urls["fast"], urls["failing"]
    healthy = stacks.database(server, [fast], fast)
    broken = stacks.database(server, [failing, fast], fast)

    def compared(name: str) -> Row:
        return Row(stack.enter_context(stacks.compared(name, fast)), "/notify")

    service = stack.enter_context(stacks.service(healthy))
    cold = "notifier.dev.bench.cold:create_app()"
    return {
        "bare": compared("bare"),
        "naive": compared("naive"),
        "FastAPI + httpx": compared("asgi"),
        "service, buyer": Row(service),
        "service, seller": Row(service, NOTIFY.format("seller")),
        "service, breaker open": Row(stack.enter_context(stacks.service(broken))),
        "service, cold cache": Row(stack.enter_context(stacks.service(healthy, cold)), share=0.2),
    }


def measure_main(rows: dict[str, Row], rounds: int, count: int) -> dict[str, list[Figures]]:
    """Take turns, each round beginning one row later; a first round is not counted."""
    names = [*rows]
    taken: dict[str, list[Figures]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            row = rows[name]
            share = int(count * row.share)
            one = take(row.stack, row.path, CALLERS, max(CALLERS, share // 8), count=share)
            if number:
                taken[name].append(one)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return taken


def show_main(taken: dict[str, list[Figures]], rows: dict[str, Row]) -> None:
    head = ("", "CPU µs", "/ bare", "quartiles", "per second", "p50 ms", "p99 ms", "memory MB")
    lines = []
    for name, rounds in taken.items():
        usual = median(rounds)
        ratio = ratios(rounds, taken["bare"], lambda one: one.cpu)
        lines.append(
            (
                name,
                f"{usual.cpu:.0f}",
                f"{ratio.median:.3f}",
                f"{ratio.low:.3f}..{ratio.high:.3f}",
                f"{usual.rate:.0f}",
                f"{usual.p50:.2f}",
                f"{usual.p99:.2f}",
                f"{rows[name].stack.memory():.0f}",
            )
        )
    print(table(head, lines))


def main_goals(taken: dict[str, list[Figures]]) -> list[Goal]:
    bounds = (
        ("service, buyer", "bare", 1.10),
        ("service, buyer", "naive", 0.70),
        ("service, buyer", "FastAPI + httpx", 0.45),
        ("service, seller", "service, buyer", 1.75),
        ("service, breaker open", "service, buyer", 1.03),
    )
    return [
        Goal(
            f"CPU: {ours} / {theirs}",
            bound,
            ratios(taken[ours], taken[theirs], lambda one: one.cpu).median,
        )
        for ours, theirs, bound in bounds
    ]


def main() -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m notifier.dev.bench")
    parser.add_argument("--only")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=1500)
    arguments = parser.parse_args()
    os.environ["no_proxy"] = "*"  # nothing here leaves the machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            server = postgres.acquire(ephemeral=True)
            stack.callback(server.close)
            urls = stack.enter_context(stacks.sink())
            rows = main_rows(stack, server, urls)
            taken = measure_main(rows, arguments.rounds, arguments.count)
            show_main(taken, rows)
            print()
            print(
                table(
                    ("goal", "bound", "measured", ""),
                    [
                        (
                            g.name,
                            f"{g.bound:.2f}",
                            f"{g.measured:.3f}",
                            "met" if g.met else "missed",
                        )
                        for g in main_goals(taken)
                    ],
                )
            )
    except (
        CannotMeasure,
        OSError,
        TimeoutError,
        subprocess.SubprocessError,
        postgres.PostgresError,
        psycopg.Error,
    ) as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
