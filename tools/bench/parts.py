"""The parts of the bench: what each one measures."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any, NamedTuple

from tools.bench import stacks
from tools.bench.figures import Figures, Memory, Point, median
from tools.bench.plan import BUYER, SELLER, Bench, take
from tools.bench.stacks import THREADS, WORKERS, Stack
from tools.bench.worker import measure_worker
from tools.rig import CannotMeasure

COMPARED = {
    "bare": stacks.BARE,
    "naive": stacks.NAIVE,
    "FastAPI + httpx": stacks.ASGI,
    "FastAPI + httpx, uvloop": stacks.ASGI_UVLOOP,
}

CALLERS = 8
DELAY = 100  # milliseconds that the slow provider takes

LATENCY_ROUNDS = 3

# How evenly the workers have to share the callers; see `Order`.
EVEN, SATURATED = 0.5, 0.85

COLD = "tools.bench.cold:create_app()"
COLD_SHARE = 0.2  # of the other rows' number of replies, because each reply takes long


# --- the main table


class Row(NamedTuple):
    """A row of the main table."""

    stack: Stack
    path: str = BUYER
    share: float = 1.0


class Main(NamedTuple):
    """The figures of each row in each round, and each stack's megabytes."""

    rounds: dict[str, list[Figures]]
    memory: dict[str, float]


def measure_main(bench: Bench) -> Main:
    """Run all stacks at once; in each turn one has callers and the others are idle.

    Each round begins one row later. The first round is a warm-up and is not counted.
    """
    with ExitStack() as stack:
        rows = _rows(bench, stack)
        taken: dict[str, list[Figures]] = {name: [] for name in rows}
        for number in range(bench.plan.rounds + 1):
            for name in _rotated([*rows], number):
                one = _turn_of(rows[name], bench.plan.replies)
                taken[name] += [one] if number else []
        return Main(taken, {name: row.stack.memory().total for name, row in rows.items()})


def _rows(bench: Bench, stack: ExitStack) -> dict[str, Row]:
    fast, failing = bench.urls["fast"], bench.urls["failing"]
    healthy = stacks.database(bench.server, [fast], fast)
    broken = stacks.database(bench.server, [failing, fast], fast)
    rows = {
        name: Row(stack.enter_context(stacks.compared(app, fast)), "/notify")
        for name, app in COMPARED.items()
    }
    service = stack.enter_context(stacks.service(healthy))
    breaker_open = stack.enter_context(stacks.service(broken))
    _open_breakers(breaker_open)
    cold = stack.enter_context(stacks.service(healthy, app=COLD))
    return rows | {
        "notifier, buyer": Row(service),
        "notifier, seller": Row(service, SELLER),
        "notifier, breaker open": Row(breaker_open),
        "notifier, cold cache": Row(cold, share=COLD_SHARE),
    }


def _open_breakers(stack: Stack) -> None:
    """Call until the failing provider's breaker is open in every worker.

    It takes several turns, as one worker may get all callers. There are no more callers than in
    later turns: each would leave a thread that stays for a while and adds cost.
    """
    for _ in range(20):
        take(stack, BUYER, CALLERS, 0, count=4 * CALLERS)
        if stacks.breakers_opened(stack) >= WORKERS:
            return
    raise CannotMeasure("a worker got no notification")


def _rotated(names: list[str], by: int) -> list[str]:
    first = by % len(names)
    return names[first:] + names[:first]


def _turn_of(row: Row, count: int) -> Figures:
    share = int(count * row.share)
    even = {"workers": WORKERS, "evenness": EVEN}
    return take(row.stack, row.path, CALLERS, share // 8, count=share, **even)


# --- how it scales


def measure_scaling(bench: Bench) -> list[Point]:
    """Vary workers, callers and the provider's delay; the bare stack has one number of workers."""
    points = []
    for (provider, delay), workers in product((("fast", 0), ("slow", DELAY)), bench.plan.workers):
        with bench.service(provider, provider, workers=workers) as stack:
            points += _over_callers(bench, stack, Point("notifier", workers, THREADS, delay))
        if workers == WORKERS:
            with stacks.compared(stacks.BARE, bench.urls[provider]) as stack:
                points += _over_callers(bench, stack, Point("bare", workers, THREADS, delay))
    return points


def _over_callers(bench: Bench, stack: Stack, at: Point) -> list[Point]:
    path = "/notify" if at.stack == "bare" else BUYER
    return [
        at.measured(callers, take(stack, path, callers, callers, seconds=bench.plan.seconds))
        for callers in bench.plan.callers
    ]


def measure_capacity(bench: Bench) -> list[Point]:
    """Keep all threads of all workers waiting for a slow provider.

    There are twice as many callers as threads, because the kernel distributes connections unevenly.
    """
    points = []
    for threads, workers in product((16, 32), bench.plan.workers):
        callers = 2 * threads * workers
        with bench.service("slow", "slow", workers=workers, threads=threads) as stack:
            even = {"workers": workers, "evenness": SATURATED}
            bounds = even | {"seconds": 2 * bench.plan.seconds}
            measured = take(stack, BUYER, callers, 2 * callers, **bounds)
        points.append(Point("notifier", workers, threads, DELAY).measured(callers, measured))
    return points


# --- latency


def measure_latency(bench: Bench) -> dict[str, Point]:
    """Call a slow provider with few callers, and with half as many callers as there are threads.

    The few callers call the provider itself, the service, and the service with a fast provider for
    the other channel. The figures are medians over rounds.
    """
    few, half = 4, WORKERS * THREADS // 2
    with bench.service("slow", "slow") as slow, bench.service("fast", "slow") as mixed:
        rows = {
            "provider": (stacks.provider(bench.urls["slow"]), "/send", few),
            "buyer": (slow, BUYER, few),
            "seller": (mixed, SELLER, few),
            "buyers": (slow, BUYER, half),
        }
        taken: dict[str, list[Figures]] = {name: [] for name in rows}
        for _, (name, (stack, path, callers)) in product(range(LATENCY_ROUNDS), rows.items()):
            one = take(stack, path, callers, 2 * callers, seconds=2 * bench.plan.seconds)
            taken[name].append(one)
    at = Point("notifier", WORKERS, THREADS, DELAY)
    return {name: at.measured(row[2], median(taken[name])) for name, row in rows.items()}


# --- memory


def measure_memory(bench: Bench) -> list[Memory]:
    """Notify buyers and sellers in turn; sample the memory after each fifth."""
    samples = []
    each = bench.plan.notifications // 10
    with bench.service("fast", "fast") as stack:
        for number in range(1, 6):
            for path in (BUYER, SELLER):
                take(stack, path, THREADS, 0, count=each, seconds=600.0)
            samples.append(Memory(2 * number * each, *stack.memory()))
    return samples


PARTS: dict[str, Callable[[Bench], Any]] = {
    "main": measure_main,
    "worker": measure_worker,
    "scaling": measure_scaling,
    "capacity": measure_capacity,
    "latency": measure_latency,
    "memory": measure_memory,
}
