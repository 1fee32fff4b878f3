"""What gunicorn's master does for the service: logs, drain, reload, and the workers' shared state.

The public functions are gunicorn's hooks, under gunicorn's names. The master loads neither Flask
nor psycopg: the workers import them after the fork, where threads and sockets belong.
"""

import functools
import itertools
import logging
import mmap
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger

from notifier import logs
from notifier.settings import WITHOUT_EFFECT, Settings, SettingsError, unknown_variables

# A file system in memory, where a write never waits for a disk. None if this machine has none.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 names are random

# Bytes that the metrics of all workers may need. A write to a full memory file system is fatal.
ROOM_FOR_METRICS = 16 * 1024 * 1024

# Seconds that a reload waits for the new workers to serve. The old workers serve meanwhile.
BOOTING = 20.0

log = logging.getLogger("notifier")


class JsonLogger(Logger):
    """Writes gunicorn's own lines as JSON. The service logs its requests itself.

    gunicorn makes it from its own configuration, so a subclass has the service's `settings`.
    """

    settings: Settings

    def setup(self, cfg: Any) -> None:
        """Configure all logs of the process."""
        self.cfg = cfg
        logs.configure(self.settings.app_name, self.settings.log_level)
        self.error_log.propagate = True
        # gunicorn's DEBUG lines quote paths and bodies.
        level = logging.getLevelName(self.settings.log_level)
        self.error_log.setLevel(max(logging.INFO, level))
        logging.captureWarnings(True)
        threading.excepthook = logs.log_dead_thread

    def access(self, *_: Any) -> None:
        """Log nothing."""


def on_starting(server: Any) -> None:
    """Log once which variables have no effect: the Go service's, and those that seem misspelt.

    Raises:
        SystemExit: gunicorn is configured in a way that the service cannot work with.
    """
    if server.cfg.preload_app:
        sys.exit("notifier cannot start: preload_app is set, but workers have to load the service")
    if server.cfg.is_ssl:
        sys.exit("notifier cannot start: certfile or keyfile is set, but it speaks plain HTTP only")
    ignored = [name for name in WITHOUT_EFFECT if os.environ.get(name, "").strip()]
    if ignored:
        message = "variables of the Go service that have no effect here"
        logging.getLogger("notifier.settings").info(message, extra={"variables": ignored})
    if unknown := unknown_variables(os.environ):
        seen = [{"name": name, "nearest": nearest} for name, nearest in unknown.items()]
        message = "unknown variables that have no effect, perhaps misspelt"
        logging.getLogger("notifier.settings").warning(message, extra={"variables": seen})


def when_ready(server: Any, settings: Settings) -> None:
    """Make what the workers share, and change how the master stops, reloads and replaces them."""
    server.draining = mmap.mmap(-1, 1)  # becomes 1 when a stop has been asked for
    server.metrics_folder = make_metrics_folder()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(server.metrics_folder)
    server.replaced = frozenset()  # process ids of the workers that a reload replaces
    server.handle_term = functools.partial(_drain, server, settings.drain_delay, server.handle_term)
    server.handle_hup = functools.partial(_reload, server, server.handle_hup)
    server.manage_workers = functools.partial(_manage, server, server.manage_workers)


def make_metrics_folder() -> Path:
    """Return a new folder of this master's own: during an upgrade by SIGUSR2 there are two.

    Raises:
        SystemExit: there is no folder to make it in.
    """
    has_room = MEMORY and shutil.disk_usage(MEMORY).free >= ROOM_FOR_METRICS
    try:
        folder = tempfile.mkdtemp(prefix="notifier-metrics-", dir=MEMORY if has_room else None)
    except OSError:
        sys.exit("notifier cannot start: expected a folder to write metrics in; set TMPDIR to one")
    log.debug("metrics folder made", extra={"folder": folder})
    return Path(folder)


def _drain(server: Any, seconds: float, stop: Callable[[], None]) -> None:
    """Stop after `seconds`, in which load balancers notice that the service is not ready."""
    if server.reexec_pid or server.master_pid:  # an upgrade: the other master takes the requests
        stop()
    at_once = server.draining[0] or not seconds
    server.draining[0] = True
    if at_once:
        stop()
    log.info("draining", extra={"seconds": seconds})
    signal.signal(signal.SIGALRM, lambda *_: os.kill(server.pid, signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _reload(server: Any, reload: Callable[[], None]) -> None:
    """Replace the workers, unless a file that a setting names has become unusable.

    Without this check gunicorn would end the service: the master and each new worker read the
    settings again.
    """
    try:
        Settings.from_env(os.environ)
    except SettingsError as error:
        log.error("not reloaded", extra={"problem": str(error)})  # noqa: TRY400 no traceback
    else:
        server.replaced = frozenset(server.WORKERS)
        reload()


def _manage(server: Any, manage: Callable[[], None]) -> None:
    """After a reload, keep the old workers until as many new ones serve.

    gunicorn would end the old ones at once, and nobody would accept connections while the new ones
    boot. It would also keep an old worker in the place of a new one that dies.
    """
    give_up = time.monotonic() + BOOTING
    while server.replaced & server.WORKERS.keys() and time.monotonic() < give_up:
        new = [worker for pid, worker in server.WORKERS.items() if pid not in server.replaced]
        if len(new) < server.num_workers:
            server.spawn_worker()
        elif all(worker.serving[0] for worker in new):
            break
        time.sleep(0.05)
        server.reap_workers()
    server.replaced = frozenset()
    manage()


def pre_fork(server: Any, worker: Any) -> None:
    """Before the fork, give `worker` the lowest number that no other worker has."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(number for number in itertools.count() if number not in taken)
    worker.draining = server.draining
    worker.serving = mmap.mmap(-1, 1)  # becomes 1 when the worker serves
    # Something that tidies up temporary files may have removed it.
    server.metrics_folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(server.metrics_folder, server.cfg.uid, server.cfg.gid)


def post_fork(server: Any, worker: Any) -> None:
    """After the fork, let `worker` count where the last one with its number stopped."""
    os.environ["METRICS_SLOT"] = str(worker.slot)
    # Until gunicorn installs the worker's handler, the master's would swallow the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def post_worker_init(worker: Any) -> None:
    """Start the service in `worker`, and tell the master that it serves."""
    worker.wsgi.extensions["notifier"].start(stopping=lambda: bool(worker.draining[0]))
    worker.serving[0] = True


def worker_exit(server: Any, worker: Any) -> None:
    """End the threads and connections of the service in `worker`, which may not have loaded it."""
    app = getattr(worker, "wsgi", None)
    if app is not None:
        app.extensions["notifier"].close()


def child_exit(server: Any, worker: Any) -> None:
    """Remove the gauges of a worker that has ended; its counts stay."""
    # Not at the top: the master starts without it.
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

    mark_process_dead(worker.slot)


def on_exit(server: Any) -> None:
    """Remove the metrics of this master."""
    shutil.rmtree(server.metrics_folder, ignore_errors=True)
