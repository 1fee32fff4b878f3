"""The service's gunicorn.conf.py, with little room for callers, and a log for each process.

gunicorn loads it in the repository's root. CHAOS_LOGS names the folder for the logs. The master
logs to a file. Each worker logs to a pipe, whose reader may stall.
"""

import os
import runpy
from pathlib import Path
from typing import Any

from tools import machine

shipped = runpy.run_path("gunicorn.conf.py")
globals().update(shipped)

worker_connections = 200  # the silent callers alone need more

FOLDER = Path(os.environ["CHAOS_LOGS"])


def _redirect(file: int, *outputs: int) -> None:
    for output in outputs:
        os.dup2(file, output)
    os.close(file)


_redirect(os.open(FOLDER / "master.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1, 2)


def post_fork(server: Any, worker: Any) -> None:
    """Redirect the worker's log to its own pipe."""
    _redirect(machine.open_log_pipe(FOLDER / f"worker-{os.getpid()}.pipe"), 1)
    shipped["post_fork"](server, worker)
