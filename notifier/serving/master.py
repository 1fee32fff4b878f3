"""The master's side of gunicorn: logs, drain, reload, and the state that workers share.

gunicorn.conf.py installs the functions named like gunicorn's hooks. The master imports neither
Flask nor psycopg: workers import them after the fork, where threads and sockets must be made.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger

from notifier import logs
from notifier.serving.log_queue import QueueHandler, dropping
from notifier.settings import Settings, SettingsError
from notifier.sharing.snapshot import Snapshot
from notifier.variables import WITHOUT_EFFECT, unknown_variables

# Folder of a memory file system, where writes never wait for a disk; None if there is none.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 names are random

# Free bytes of memory below which the metrics go to a disk. A worker takes 0.5 MiB, and 3 MiB if it
# has called 300 endpoints; a reload doubles the workers.
ROOM_FOR_METRICS = 16 * 1024 * 1024

# Maximum seconds that a reload waits for new workers to serve. The old workers serve meanwhile.
BOOT_SECONDS = 20.0

log = logging.getLogger("notifier")


class JsonLogger(Logger):
    """Logs gunicorn's own lines as JSON. The service logs its requests itself.

    gunicorn makes the instance, so a subclass in gunicorn.conf.py sets the service's `settings`.
    """

    settings: Settings

    def __init__(self, cfg: Any) -> None:
        self.queue = QueueHandler(sys.stdout)
        if sys.stderr:  # gunicorn and the interpreter write to it
            sys.stderr = dropping(sys.stderr)
        super().__init__(cfg)

    def setup(self, cfg: Any) -> None:
        """Configure logging for the whole process."""
        self.cfg = cfg
        logs.configure(self.settings.app_name, self.settings.log_level, self.queue)
        self.error_log.propagate = True
        # gunicorn's DEBUG lines quote paths and bodies.
        level = logging.getLevelName(self.settings.log_level)
        self.error_log.setLevel(max(logging.INFO, level))
        logging.captureWarnings(True)
        threading.excepthook = logs.log_dead_thread

    def access(self, *_: Any) -> None:
        """Log nothing: the service logs each request."""


def on_starting(server: Any) -> None:
    """Log once which variables have no effect: the Go service's, and those that seem misspelt.

    Raises:
        SystemExit: the service does not support a gunicorn setting.
    """
    if server.cfg.preload_app:
        sys.exit("notifier cannot start: preload_app is set, but workers have to load the service")
    if server.cfg.is_ssl:
        sys.exit("notifier cannot start: certfile or keyfile is set, but it speaks plain HTTP only")
    ignored = [name for name in WITHOUT_EFFECT if os.environ.get(name, "").strip()]
    if ignored:
        message = "variables of the Go service that have no effect here"
        logging.getLogger("notifier.settings").info(message, extra={"variables": ignored})
    if unknown := unknown_variables(os.environ, Settings.variables()):
        seen = [{"name": name, "nearest": nearest} for name, nearest in unknown.items()]
        message = "unknown variables that have no effect, perhaps misspelt"
        logging.getLogger("notifier.settings").warning(message, extra={"variables": seen})


def when_ready(server: Any, settings: Settings) -> None:
    """Make the state that workers share; replace how the master stops, reloads and manages them."""
    server.draining = mmap.mmap(-1, 1)  # set to 1 when a stop is requested
    server.snapshot = make_snapshot()
    server.metrics_folder = make_metrics_folder()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(server.metrics_folder)
    server.replaced = frozenset()  # process ids of the workers that a reload replaces
    server.handle_term = functools.partial(_drain, server, settings.drain_delay, server.handle_term)
    server.handle_hup = functools.partial(_reload, server, server.handle_hup)
    server.manage_workers = functools.partial(_manage, server, server.manage_workers)
    once = logs.OncePerSecond()
    server.spawn_worker = functools.partial(_spawn, server, once, server.spawn_worker)


def make_metrics_folder() -> Path:
    """Make a folder for the metrics of this master alone: an upgrade by SIGUSR2 runs two masters.

    Raises:
        SystemExit: no writable folder for temporary files exists.
    """
    has_room = MEMORY and shutil.disk_usage(MEMORY).free >= ROOM_FOR_METRICS
    for parent in (MEMORY, None) if has_room else (None, MEMORY):
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="notifier-metrics-", dir=parent)
            log.debug("metrics folder made", extra={"folder": folder})
            return Path(folder)
    sys.exit("notifier cannot start: metrics need a writable folder; set TMPDIR to one")


def make_snapshot() -> Snapshot | None:
    """Make the memory in which workers hand over the providers; None if that fails."""
    try:
        return Snapshot()
    except OSError as error:
        fields = {"error": type(error).__name__, "reason": error.strerror}
        log.warning("workers cannot hand over providers", extra=fields)
        return None


def _drain(server: Any, seconds: float, stop: Callable[[], None]) -> None:
    """Stop after `seconds`, which give load balancers time to see that the service is not ready."""
    if server.reexec_pid or server.master_pid:  # an upgrade: the other master serves
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

    Without this check gunicorn would stop the service, because the master and each new worker read
    the settings again.
    """
    try:
        Settings.from_env(os.environ)
    except SettingsError as error:
        log.error("not reloaded", extra={"problem": str(error)})  # noqa: TRY400 no traceback
    else:
        server.replaced = frozenset(server.WORKERS)
        reload()


def _manage(server: Any, manage: Callable[[], None]) -> None:
    """Write queued log lines; after a reload, keep the old workers until all new workers serve.

    gunicorn would stop the old workers at once, and no worker would accept connections while the
    new ones boot. If a new worker died, gunicorn would keep an old one in its place.
    """
    server.log.queue.write_queued()
    give_up = time.monotonic() + BOOT_SECONDS
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


def _spawn(server: Any, once: logs.OncePerSecond, spawn: Callable[[], object]) -> None:
    """Start a worker, or log why the system cannot: gunicorn tries again within a second.

    Without this gunicorn's master would end, and with it all workers.
    """
    try:
        spawn()
    except OSError as error:
        if os.getpid() != server.pid:  # the new worker
            raise
        # Perhaps only one of the two folders has room for the heartbeat's file.
        server.cfg.set("worker_tmp_dir", None if server.cfg.worker_tmp_dir else MEMORY)
        if times := once.times(error.errno):
            fields = {"reason": error.strerror, "times": times}
            log.error("worker not started", extra=fields)  # noqa: TRY400 no traceback


def pre_fork(server: Any, worker: Any) -> None:
    """Give `worker` the lowest free slot, before the fork."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(number for number in itertools.count() if number not in taken)
    worker.draining, worker.snapshot = server.draining, server.snapshot
    worker.serving = mmap.mmap(-1, 1)  # set to 1 when the worker serves
    # A cleaner of temporary files may have removed it. Without it the worker counts in its memory.
    with suppress(OSError):
        server.metrics_folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(server.metrics_folder, server.cfg.uid, server.cfg.gid)


def post_fork(server: Any, worker: Any) -> None:
    """Let `worker` continue the counts of the last worker in its slot, after the fork."""
    os.environ["METRICS_SLOT"] = str(worker.slot)
    # Until gunicorn installs the worker's handler, the master's handler would swallow the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def post_worker_init(worker: Any) -> None:
    """Start the service in `worker`, and tell the master that the worker serves."""
    # Not at the top: the master does not load prometheus_client before a worker ends.
    from notifier.metrics import LOG_LINES_DROPPED  # noqa: PLC0415

    worker.log.queue.start(LOG_LINES_DROPPED.inc)
    notifier = worker.wsgi.extensions["notifier"]
    notifier.start(stopping=lambda: bool(worker.draining[0]), snapshot=worker.snapshot)
    worker.serving[0] = True


def worker_exit(server: Any, worker: Any) -> None:
    """Close the service in `worker`, if the worker has loaded it."""
    app = getattr(worker, "wsgi", None)
    if app is not None:
        app.extensions["notifier"].close()


def child_exit(server: Any, worker: Any) -> None:
    """Remove the gauges of a dead worker; its counters stay."""
    # Not at the top: the master imports it only when a worker ends.
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

    with suppress(OSError):  # it would end the master
        mark_process_dead(worker.slot)


def on_exit(server: Any) -> None:
    """Remove this master's metrics."""
    shutil.rmtree(server.metrics_folder, ignore_errors=True)
