"""gunicorn's configuration. In this folder, `gunicorn` starts the service without arguments."""

import math

from notifier.serving import descriptors, listening, master
from notifier.serving.worker import Worker
from notifier.settings import settings_or_exit

settings = settings_or_exit()

wsgi_app = "notifier.app:create_app()"
bind = listening.addresses(settings.http_server_host, settings.http_server_port)
workers = settings.web_concurrency
threads = settings.server_threads
preload_app = False
worker_class = Worker
http_parser = "python"  # serving/caller.py relies on its strictness

# Maximum connections per worker.
worker_connections = descriptors.connections(settings, descriptors.raise_limit())

# Seconds that idle connections are kept; gunicorn takes whole ones.
keepalive = math.ceil(settings.http_server_keepalive)

# Ignore headers that set the path or the scheme, even from this machine.
forwarder_headers = ""
secure_scheme_headers = {}

# Seconds: requests under way may take until their deadline, and the rest is a margin.
graceful_timeout = round(settings.notify_deadline + 15)

# Workers touch a file as a heartbeat. On a disk, a touch can block.
worker_tmp_dir = master.MEMORY

# The control socket would be in the home directory, which may be missing or read-only.
control_socket_disable = True


class JsonLogger(master.JsonLogger):
    """Logs gunicorn's own lines as JSON, with the service's settings."""

    settings = settings


logger_class = JsonLogger


def on_starting(server):
    """Check the configuration and the environment, and log warnings."""
    master.on_starting(server)
    descriptors.log_low_limit(settings)


def when_ready(server):
    """Make the state that workers share, before the first fork."""
    master.when_ready(server, settings)


pre_fork = master.pre_fork
post_fork = master.post_fork
post_worker_init = master.post_worker_init
worker_exit = master.worker_exit
child_exit = master.child_exit
on_exit = master.on_exit
