"""How gunicorn runs the service: `gunicorn`, in this folder, needs no argument.

Only the settings and the logs are imported here. Flask, psycopg and what makes threads or sockets
are imported by the workers, after the fork.
"""

import logging
import os
import threading

from gunicorn.glogging import Logger

from notifier import logs
from notifier.settings import WITHOUT_EFFECT, settings_or_exit

settings = settings_or_exit()

wsgi_app = "notifier.app:create_app()"
bind = f"0.0.0.0:{settings.http_server_port}"
worker_class = "gthread"
workers = settings.web_concurrency
threads = settings.web_threads
preload_app = False

# The callers are services that keep their connections; most load balancers do for a minute.
keepalive = 75

# No header of a caller decides about paths or schemes, not even from this machine.
forwarder_headers = ""
secure_scheme_headers = {}

# Requests under way may take their deadline; the rest is for what surrounds them.
graceful_timeout = round(settings.notify_deadline + 15)

MEMORY = "/dev/shm"  # noqa: S108 gunicorn makes an unlinked file with a random name there

# Workers touch a file to show that they live. On a disk that can block, in memory it does not.
if os.access(MEMORY, os.W_OK):
    worker_tmp_dir = MEMORY

# It would open a socket in the home directory, which need not exist or be writable.
control_socket_disable = True


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
    ignored = [name for name in WITHOUT_EFFECT if os.environ.get(name, "").strip()]
    if ignored:
        message = "variables of the Go service that have no effect here"
        logging.getLogger("notifier.settings").info(message, extra={"variables": ignored})


def worker_exit(server, worker):
    """End the worker's threads and connections."""
    app = getattr(worker, "wsgi", None)
    if app is not None:
        app.extensions["notifier"].close()
