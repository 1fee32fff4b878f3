"""The service's gunicorn.conf.py, except that each process logs to a file of its own.

gunicorn loads it in the repository's root. CHAOS_LOGS names the folder for the logs.
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
    """Redirect the worker's output to its own log."""
    _log_to(f"worker-{os.getpid()}")
    shipped["post_fork"](server, worker)
