"""The plot: CPU per notification, and notifications per second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tools.bench.figures import Point, median
from tools.bench.parts import COMPARED, DELAY, Main

OURS, THEIRS, INK = "#2563a8", "#9aa3ad", "#24292f"


def draw(path: Path, main: Main, scaling: Sequence[Point]) -> None:
    """Write a PNG of 1200 by 500 pixels; its background is white, even on dark pages."""
    mpl.rcParams.update({"font.size": 11, "text.color": INK, "axes.labelcolor": INK})
    figure = Figure(figsize=(12, 5), dpi=100, facecolor="white", layout="constrained")
    cost, scale = figure.subplots(1, 2, width_ratios=(5, 6))
    _bars(cost, main)
    _lines(scale, scaling)
    figure.savefig(path)


def _bars(axes: Any, main: Main) -> None:
    cpu = {name: median(rounds).cpu for name, rounds in main.rounds.items() if "cold" not in name}
    bars = axes.barh(
        [*cpu], [*cpu.values()], color=[THEIRS if n in COMPARED else OURS for n in cpu]
    )
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.invert_yaxis()
    axes.set_title("CPU per notification, µs")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])


def _lines(axes: Any, scaling: Sequence[Point]) -> None:
    slow = [point for point in scaling if point.delay == DELAY]
    for stack, workers in dict.fromkeys((point.stack, point.workers) for point in slow):
        line = [point for point in slow if (point.stack, point.workers) == (stack, workers)]
        axes.plot(
            [point.callers for point in line],
            [point.figures.rate for point in line],
            label=f"{stack}, {workers} worker{'s'[: workers > 1]}",
            color=THEIRS if stack == "bare" else OURS,
            marker="os^D"[workers.bit_length() - 1],
            linestyle="--" if stack == "bare" else "-",
        )
    axes.set_title(f"Notifications per second, providers at {DELAY} ms")
    axes.set_xlabel("callers")
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
