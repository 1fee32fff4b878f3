"""Counters of processes: CPU time, context switches and system calls.

It imports only the standard library, because the load generator uses it and has to start quickly.
"""

import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

ATTACH_TIMEOUT = 10.0  # seconds; strace stops each thread for a moment to attach

_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)
_TRACER = re.compile(r"^TracerPid:\s*(\d+)", re.MULTILINE)


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time of processes, user and system, including their ended threads."""
    if platform.system() == "Linux":
        # clock_getcpuclockid(3), which Python lacks. It has nanoseconds; /proc has only ticks.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
    import psutil  # noqa: PLC0415 not needed on Linux

    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


class Switches(NamedTuple):
    """Context switches: because the thread waited, or because the kernel preempted it."""

    voluntary: int = 0
    involuntary: int = 0


def switches(pids: Sequence[int]) -> dict[str, Switches]:
    """Return the context switches of each thread; empty where there is no /proc."""
    return {
        thread: Switches(*map(int, _SWITCHES.findall(status)))
        for thread, status in _threads(pids)
        if status
    }


def growth(before: dict[str, Switches], after: dict[str, Switches]) -> Switches:
    """Return the switches between two readings, without those of threads that ended in between."""
    none = Switches()
    grown = [
        (now.voluntary - then.voluntary, now.involuntary - then.involuntary)
        for now, then in ((now, before.get(thread, none)) for thread, now in after.items())
    ]
    return Switches(*map(sum, zip(*grown, strict=True))) if grown else none


def _threads(pids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield the id and status of each thread; the status of a thread that just ended is empty."""
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            try:
                yield thread.name, (thread / "status").read_text()
            except OSError:
                yield thread.name, ""


class Calls:
    """Counted system calls; `problem` says why there are none."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}
        self.problem = ""


@contextmanager
def system_calls(pids: Sequence[int]) -> Iterator[Calls]:
    """Count the system calls that the processes make during the block, with strace.

    strace stops a thread at each call, so do not measure time or switches in the block. Without
    processes nothing is counted.
    """
    counted = Calls()
    if pids and not shutil.which("strace"):
        counted.problem = "strace is not installed"
    if not pids or counted.problem:
        yield counted
        return
    each = [option for pid in pids for option in ("-p", str(pid))]
    with (
        NamedTemporaryFile("r") as summary,
        subprocess.Popen(
            ["strace", "-c", "-f", "-o", summary.name, *each],  # noqa: S607 found on the PATH
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as strace,
    ):
        if not _attached(strace, pids):
            counted.problem = "strace cannot attach"
        try:
            yield counted
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait()
        counted.by_name = _parsed(summary.read())


def _attached(strace: "subprocess.Popen[bytes]", pids: Sequence[int]) -> bool:
    """Wait until strace traces every thread; return False if it exits or takes too long."""
    give_up = time.monotonic() + ATTACH_TIMEOUT
    while strace.poll() is None and time.monotonic() < give_up:
        tracers = [_TRACER.search(status) for _, status in _threads(pids)]
        if all(found and int(found[1]) for found in tracers):
            return True
        time.sleep(0.02)
    return False


def _parsed(summary: str) -> dict[str, int]:
    """Return the number of calls by name from the table that `strace -c` writes."""
    lines = [line.split() for line in summary.splitlines()]
    rows = [line for line in lines if len(line) in (5, 6) and line[0][0].isdigit()]
    return {row[-1]: int(row[3]) for row in rows if row[-1] != "total"}
