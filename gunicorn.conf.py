"""How gunicorn runs the service: `gunicorn`, in this folder, needs no argument."""

from notifier.serving import master
from notifier.serving.worker import Worker
from notifier.settings import settings_or_exit

settings = settings_or_exit()

wsgi_app = "notifier.app:create_app()"
bind = f"0.0.0.0:{settings.http_server_port}"
workers = settings.web_concurrency
threads = settings.server_threads
preload_app = False
worker_class = Worker
http_parser = "python"  # serving/caller.py relies on what it refuses

# Connections of a worker. Beside those in threads there is room for many that are kept.
worker_connections = max(1000, 2 * threads)

# The callers are services that keep their connections; most load balancers do for a minute.
keepalive = 75

# No header of a caller decides about paths or schemes, not even from this machine.
forwarder_headers = ""
secure_scheme_headers = {}

# Requests under way may take their deadline; the rest is for what surrounds them.
graceful_timeout = round(settings.notify_deadline + 15)

# Workers touch a file to show that they live. On a disk that can block.
worker_tmp_dir = master.MEMORY

# It would open a socket in the home directory, which need not exist or be writable.
control_socket_disable = True


class JsonLogger(master.JsonLogger):
    """gunicorn's own lines, as JSON like all others."""

    settings = settings


logger_class = JsonLogger


def when_ready(server):
    """Make what the workers share, before the first is forked."""
    master.when_ready(server, settings)


on_starting = master.on_starting
pre_fork = master.pre_fork
post_fork = master.post_fork
post_worker_init = master.post_worker_init
worker_exit = master.worker_exit
child_exit = master.child_exit
on_exit = master.on_exit
