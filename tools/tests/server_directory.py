"""A directory for a PostgreSQL of a test's own, and the processes that run in it."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.timing import eventually


@contextmanager
def directory() -> Iterator[Path]:
    """Yield a directory that does not exist yet; at the end, kill its processes and remove it."""
    # Not pytest's tmp_path: for root the server runs as another account, which cannot enter it.
    parent = Path(tempfile.mkdtemp(prefix="notifier-test-", dir="/tmp")).resolve()
    parent.chmod(0o755)
    yield parent / "server"
    kill_all(parent)
    shutil.rmtree(parent)


def processes(base: Path) -> dict[int, str]:
    """Return the command lines that name the directory, by process id."""
    if Path("/proc/self/cmdline").exists():
        found = {int(path.name): command_line(path) for path in Path("/proc").glob("[0-9]*")}
    else:
        ps = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True, check=True)
        rows = [line.split(maxsplit=1) for line in os.fsdecode(ps.stdout).splitlines()]
        found = {int(row[0]): row[1] for row in rows if len(row) > 1}
    return {pid: command for pid, command in found.items() if str(base) in command}


def command_line(process: Path) -> str:
    """Return a process's command line from /proc; it is empty for a zombie or an ended process."""
    try:
        return os.fsdecode((process / "cmdline").read_bytes()).replace("\0", " ")
    except OSError:
        return ""


def kill_all(base: Path) -> None:
    """Kill all processes that name the directory, as a crash of the machine would."""

    def none_left() -> bool:
        found = processes(base)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    eventually(none_left)
