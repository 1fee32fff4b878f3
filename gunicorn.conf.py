"""How gunicorn runs the service: `gunicorn`, in this folder, needs no argument.

Only the settings, the logs and the worker's class are imported here. Flask, psycopg and what makes
threads or sockets are imported by the workers, after the fork.
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
from pathlib import Path

from gunicorn.glogging import Logger

from notifier import logs
from notifier.serving.worker import Worker
from notifier.settings import WITHOUT_EFFECT, Settings, SettingsError, settings_or_exit

settings = settings_or_exit()

wsgi_app = "notifier.app:create_app()"
bind = f"0.0.0.0:{settings.http_server_port}"
workers = settings.web_concurrency
threads = settings.server_threads
preload_app = False

# Connections of a worker. Beside those in threads there is room for many that are kept.
worker_connections = max(1000, 2 * threads)

# The callers are services that keep their connections; most load balancers do for a minute.
keepalive = 75

# No header of a caller decides about paths or schemes, not even from this machine.
forwarder_headers = ""
secure_scheme_headers = {}

# Requests under way may take their deadline; the rest is for what surrounds them.
graceful_timeout = round(settings.notify_deadline + 15)

# None where a file system in memory is missing: what is made there has random names.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108

# Workers touch a file to show that they live. On a disk that can block, in memory it does not.
worker_tmp_dir = MEMORY

# What the metrics of some workers may need. Who writes to memory that is full is killed.
ROOM_FOR_METRICS = 16 * 1024 * 1024

# It would open a socket in the home directory, which need not exist or be writable.
control_socket_disable = True

# Seconds that new workers may take until they serve; old ones do meanwhile.
BOOTING = 20.0

worker_class = Worker


class JsonLogger(Logger):
    """gunicorn's own lines, as JSON like all others. The service logs its requests itself."""

    def setup(self, cfg):
        self.cfg = cfg
        logs.configure(settings.app_name, settings.log_level)
        self.error_log.propagate = True
        # Its DEBUG lines quote paths and bodies.
        self.error_log.setLevel(max(logging.INFO, logging.getLevelName(settings.log_level)))
        logging.captureWarnings(True)
        threading.excepthook = logs.log_dead_thread

    def access(self, *_):
        """Log nothing."""


logger_class = JsonLogger


def on_starting(server):
    """Say once which variables of the Go service's environment are set in vain."""
    if server.cfg.preload_app:
        sys.exit("notifier cannot start: preload_app is set, but workers have to load the service")
    if server.cfg.is_ssl:
        sys.exit("notifier cannot start: certfile or keyfile is set, but it speaks plain HTTP only")
    ignored = [name for name in WITHOUT_EFFECT if os.environ.get(name, "").strip()]
    if ignored:
        message = "variables of the Go service that have no effect here"
        logging.getLogger("notifier.settings").info(message, extra={"variables": ignored})


def when_ready(server):
    """Make what the workers will share, before the first is forked."""
    server.draining = mmap.mmap(-1, 1)  # not zero once a stop has been asked for
    server.metrics_folder = _new_folder()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(server.metrics_folder)
    server.handle_term = functools.partial(_drain, server, server.handle_term)
    server.replaced = frozenset()  # process ids of workers that a reload has made superfluous
    server.handle_hup = functools.partial(_reload, server, server.handle_hup)
    server.manage_workers = functools.partial(_manage, server, server.manage_workers)


def _new_folder():
    """Return a folder of this master only: an upgrade by SIGUSR2 has two for a while."""
    has_room = MEMORY and shutil.disk_usage(MEMORY).free >= ROOM_FOR_METRICS
    try:
        folder = tempfile.mkdtemp(prefix="notifier-metrics-", dir=MEMORY if has_room else None)
    except OSError:
        sys.exit("notifier cannot start: expected a folder to write metrics in; set TMPDIR to one")
    logging.getLogger("notifier").debug("metrics folder made", extra={"folder": folder})
    return Path(folder)


def _drain(server, stop):
    """Stop once whoever routes requests to us has had time to see that we are not ready."""
    if server.reexec_pid or server.master_pid:  # an upgrade: the other master takes the requests
        stop()
    in_a_hurry = server.draining[0] or not settings.drain_delay
    server.draining[0] = True
    if in_a_hurry:
        stop()
    logging.getLogger("notifier").info("draining", extra={"seconds": settings.drain_delay})
    signal.signal(signal.SIGALRM, lambda *_: os.kill(server.pid, signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, settings.drain_delay)


def _reload(server, reload):
    """Replace the workers, unless a file that a setting names has become unusable.

    gunicorn would end the service: the master reads the settings again, and so do the new workers.
    """
    try:
        Settings.from_env(os.environ)
    except SettingsError as error:
        fields = {"problem": str(error)}
        logging.getLogger("notifier").error("not reloaded", extra=fields)  # noqa: TRY400 no traceback
    else:
        server.replaced = frozenset(server.WORKERS)
        reload()


def _manage(server, manage):
    """After a reload, let the old workers serve until as many new ones do.

    gunicorn would end them at once, and nobody would take connections while the new ones boot. And
    for a new one that dies meanwhile it would keep an old one.
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


def pre_fork(server, worker):
    """Give the worker the lowest number that no other has."""
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(number for number in itertools.count() if number not in taken)
    worker.draining = server.draining
    worker.serving = mmap.mmap(-1, 1)
    # Whoever tidies up temporary files must not keep workers from starting.
    server.metrics_folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(server.metrics_folder, server.cfg.uid, server.cfg.gid)


def post_fork(server, worker):
    """Let the worker count where the last one with its number stopped."""
    os.environ["METRICS_SLOT"] = str(worker.slot)
    # Until it has a handler of its own it has the master's, which would lose the signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def post_worker_init(worker):
    """Begin to serve."""
    worker.wsgi.extensions["notifier"].start(stopping=lambda: bool(worker.draining[0]))
    worker.serving[0] = True


def pre_request(worker, request):
    """Let callers that keep their connection move to another instance while this one stops."""
    if worker.draining[0]:
        request.force_close()


def worker_exit(server, worker):
    """End the worker's threads and connections."""
    app = getattr(worker, "wsgi", None)
    if app is not None:
        app.extensions["notifier"].close()


def child_exit(server, worker):
    """Forget the gauges of a worker that has ended; its counts stay."""
    # Not at the top: the master begins without what belongs to the workers.
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

    mark_process_dead(worker.slot)


def on_exit(server):
    """Remove the metrics of this master."""
    shutil.rmtree(server.metrics_folder, ignore_errors=True)
