"""The service's gunicorn.conf.py, except that each process logs into a file of its own.

gunicorn loads it in the repository's root. The folder for the files is in CHAOS_LOGS.
"""

import os
import runpy
from pathlib import Path
from typing import Any

shipped = runpy.run_path("gunicorn.conf.py")
globals().update(shipped)


def _log_to(name: str) -> None:
    path = Path(os.environ["CHAOS_LOGS"], f"{name}.log")
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


_log_to("master")


def post_fork(server: Any, worker: Any) -> None:
    """Begin the worker's own log."""
    _log_to(f"worker-{os.getpid()}")
    shipped["post_fork"](server, worker)
