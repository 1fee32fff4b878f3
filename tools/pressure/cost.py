"""The CPU of a log line and of an address. `make bench BESIDE=FOLDER` measures a notification."""

import subprocess
import sys
from collections.abc import Iterator

from tools.pressure import timing
from tools.pressure.stand import Row, Stand
from tools.rig import CannotMeasure, with_path

TIMEOUT = 60.0


def log_line(stand: Stand) -> Iterator[Row]:
    """Measure the CPU of writing a line of the log."""
    yield Row("CPU until it is written, all threads", "", f"{_step(stand, 'log line')} µs")


def address(stand: Stand) -> Iterator[Row]:
    """Measure the CPU of validating a body, with domains seen before and with new ones."""
    yield Row("CPU of its validation, domain seen before", "", f"{_step(stand, 'known domain')} µs")
    yield Row("CPU of its validation, new domain", "", f"{_step(stand, 'new domain')} µs")


def _step(stand: Stand, name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", timing.__file__, name],
        check=False,
        cwd=stand.checkout,
        env=with_path({"PYTHONPATH": str(stand.checkout)}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    )
    lines = done.stderr.strip().splitlines() or [""]
    if done.returncode:
        raise CannotMeasure(lines[-1])
    return lines[-1]
