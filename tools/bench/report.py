"""The measured figures, as text and as JSON."""

import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from notifier.settings import available_cpus
from tools import ROOT
from tools.bench.figures import (
    Goal,
    Memory,
    Point,
    Summary,
    capacity_goals,
    latency_goals,
    main_goals,
    median,
    memory_goals,
    ratio,
)
from tools.bench.parts import Main
from tools.bench.worker import Work, Works, ratios, worker_goals

Text = Sequence[str]

NAMED_CALLS = 6  # the number of system calls that the table names


def machine() -> str:
    """Describe the machine, the CPU that other processes use now, and the software."""
    others = f"{psutil.cpu_percent(interval=1):.0f} % used by others"
    packages = ("gunicorn", "flask", "requests", "fastapi", "httpx", "uvicorn")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cpus = f"{available_cpus()} CPUs{_model()}, {others}"
    return f"{cpus}, {platform.system()}, Python {platform.python_version()}; {versions}"


def compared(folder: Path) -> str:
    """Name both commits of a comparison with the checkout in `folder`."""
    return f"this tree {_commit(ROOT)}, beside {folder} {_commit(folder)}"


def _commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    with suppress(OSError):  # git is not installed
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


def _model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f" ({names[0]})" if names else ""


def table(head: Text, rows: Iterable[Text]) -> str:
    """Return a Markdown table whose first column is text; the others are figures."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summarised(main: Main) -> dict[str, Summary]:
    """Return the main table's rows by name."""
    bare = main.rounds["bare"]
    return {
        name: Summary(median(rounds), ratio(rounds, bare), main.memory[name])
        for name, rounds in main.rounds.items()
    }


def main_table(main: Main) -> str:
    """Compare each row with the bare stack."""
    head = ("", "CPU µs", "/ bare", "quartiles", "per second", "p50 ms", "p99 ms", "memory MB")
    rows = [
        (
            name,
            f"{usual.cpu:.0f}",
            f"{to_bare.median:.2f}",
            f"{to_bare.low:.2f} to {to_bare.high:.2f}",
            f"{usual.rate:.0f}",
            f"{usual.p50:.1f}",
            f"{usual.p99:.1f}",
            f"{memory:.0f}",
        )
        for name, (usual, to_bare, memory) in summarised(main).items()
    ]
    return table(head, rows)


def works_table(works: Works) -> str:
    """Show a notification's cost in each checkout's worker, and compare ours with the other."""
    head = ("one worker", "CPU µs", "voluntary switches", "involuntary", "system calls")
    rows = [
        (f"{case}: {side}" if len(sides) > 1 else case, *_work_cells(work))
        for case, sides in works.items()
        for side, work in sides.items()
    ]
    text = table((*head, "most frequent"), rows)
    lines = [
        (
            case,
            f"{one.ratio.median:.3f}",
            f"{one.between[0]:.3f} to {one.between[1]:.3f}",
            f"{one.ratio.low:.3f} to {one.ratio.high:.3f}",
            str(one.rounds),
        )
        for case, one in ratios(works).items()
    ]
    if lines:
        head = ("CPU: this tree / beside", "median", "95 % confidence", "quartiles", "bursts")
        text += f"\n\n{table(head, lines)}"
    return text


def _work_cells(work: Work) -> Text:
    usual = median(work.bursts)
    switches = (f"{usual.voluntary:.1f}", f"{usual.involuntary:.1f}")
    if not usual.voluntary:
        switches = ("not measured", "not measured")
    if work.problem:
        return (f"{usual.cpu:.0f}", *switches, f"not measured: {work.problem}", "")
    frequent = sorted(work.calls.items(), key=lambda one: -one[1])[:NAMED_CALLS]
    names = ", ".join(f"{name} {calls:.1f}" for name, calls in frequent)
    return (f"{usual.cpu:.0f}", *switches, f"{sum(work.calls.values()):.1f}", names)


def points_table(points: Iterable[tuple[str, Point]]) -> str:
    """Show each point in a row with its name."""
    head = ("", "workers", "threads", "provider", "callers", "per second", "p50 ms", "p99 ms")
    rows = [
        (
            name,
            str(point.workers),
            str(point.threads),
            f"{point.delay} ms",
            str(point.callers),
            f"{point.figures.rate:.0f}",
            f"{point.figures.p50:.1f}",
            f"{point.figures.p99:.1f}",
            f"{point.figures.cpu:.0f}",
            f"{100 * point.figures.busy:.0f} %",
            str(point.figures.refused),
        )
        for name, point in points
    ]
    return table((*head, "CPU µs", "machine busy", "refused"), rows)


def memory_table(samples: Iterable[Memory]) -> str:
    """Show the samples of memory."""
    rows = [(str(one[0]), f"{one.workers:.1f}", f"{one.total:.1f}") for one in samples]
    return table(("notifications", "two workers, MB", "with the master, MB"), rows)


def goals_table(goals: Iterable[Goal]) -> str:
    """Show each goal's bound, measured value and verdict."""
    rows = [
        (
            goal.name,
            f"{'at least' if goal.at_least else 'at most'} {goal.bound:g}",
            "" if goal.measured is None else f"{goal.measured:.2f}",
            goal.verdict,
        )
        for goal in goals
    ]
    return table(("goal", "bound", "measured", ""), rows)


@dataclass(frozen=True)
class Part:
    """How a part's figures are shown and judged."""

    title: str
    show: Callable[[Any], str]
    judge: Callable[[Any], list[Goal]]


PARTS = {
    "main": Part(
        "Providers at 0 ms, 8 callers; with a cold cache each look-up queries PostgreSQL, whose "
        "CPU is not counted; memory is PSS while all stacks run",
        main_table,
        lambda main: main_goals(main.rounds),
    ),
    "worker": Part(
        "One worker, per notification; system calls without futex",
        works_table,
        worker_goals,
    ),
    "scaling": Part(
        "Scaling",
        lambda points: points_table((point.stack, point) for point in points),
        lambda _: [],
    ),
    "capacity": Part(
        "Capacity, with twice as many callers as threads",
        lambda points: points_table((point.stack, point) for point in points),
        capacity_goals,
    ),
    "latency": Part(
        "Latency below saturation", lambda points: points_table(points.items()), latency_goals
    ),
    "memory": Part("Memory (PSS), while no other stack runs", memory_table, memory_goals),
}


def write(path: Path, measured: Mapping[str, Any], goals: Sequence[Goal], about: str) -> None:
    """Write all figures to a JSON file."""
    content = {
        "machine": about,
        **{name: _plain(value) for name, value in measured.items()},
        "goals": [goal._asdict() | {"verdict": goal.verdict} for goal in goals],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Convert named tuples to dictionaries, and round figures to four significant digits."""
    if isinstance(value, Main):
        value = summarised(value)
    if isinstance(value, Work):
        value = value.summary()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
