"""The service as operators run it: gunicorn in the repository's root, configured by variables."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.timing import eventually

ROOT = Path(__file__).parent.parent
MESSAGE = {"to": "buyer@example.com", "title": "Hello", "message": "It is on its way."}
START_SECONDS = 30

# The script, not the module: gunicorn can re-execute only the script on SIGUSR2.
GUNICORN = Path(sys.executable).with_name("gunicorn")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """Return a minimal environment that holds none of the tests' own variables."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


class Service:
    """A running gunicorn, by default with one worker.

    Its output goes to the file `log`, or to the descriptor `output`. `within` is a command that
    executes its arguments.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        within: tuple[str, ...] = (),
        output: int | None = None,
    ) -> None:
        self.port = free_port()
        host = environment.get("HTTP_SERVER_HOST", "127.0.0.1")
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self.log = folder / f"service-{self.port}.log"
        self._replied: list[str] = []  # ids of the requests that `notify` sent
        ours = {"HTTP_SERVER_PORT": str(self.port), "WEB_CONCURRENCY": "1", "LOG_LEVEL": "DEBUG"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*within, GUNICORN],
                cwd=ROOT,
                env=clean_environment() | ours | environment,
                stdin=subprocess.DEVNULL,
                stdout=log if output is None else output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> "Service":
        """Return once every worker has started and the service answers."""
        give_up = time.monotonic() + START_SECONDS
        while len(self.booted()) < self.workers_wanted() or not self._serves():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.05)
        return self

    def wait_until_listening(self) -> "Service":
        """Return once every worker has loaded the providers and listens for changes."""
        eventually(lambda: self.metric("preference_listener_connected") == 1)
        return self

    def workers_wanted(self) -> int:
        return int(psutil.Process(self.process.pid).environ().get("WEB_CONCURRENCY", 1))

    def booted(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def _serves(self) -> bool:
        try:
            return self.metric("worker_starts_total") >= self.workers_wanted()
        except (requests.ConnectionError, requests.Timeout):
            return False  # the master opens the port long before a worker answers

    def notify(
        self, recipient: str = "buyer", session: Any = requests, **options: Any
    ) -> requests.Response:
        """Post `MESSAGE` and return the reply.

        `options` override the arguments of the POST. Pass a `session` to reuse its connection.
        """
        url = f"{self.url}/api/v1.0/recipient/{recipient}/notify"
        reply: requests.Response = session.post(url, **({"json": MESSAGE, "timeout": 30} | options))
        if request_id := reply.headers.get("X-Request-Id"):
            self._replied.append(request_id)
        return reply

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """Return the name, labels and value of every series on `/metrics`."""
        page = requests.get(f"{self.url}/metrics", timeout=10).text
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        ]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum over the series called `name` that have `labels`."""
        return sum(
            value
            for sample, has, value in self.samples()
            if sample == name and labels.items() <= has.items()
        )

    def send_raw(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send raw bytes and return all that the service sends until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            reply = b""
            while chunk := sock.recv(65536):
                reply += chunk
            return reply

    def lines(self) -> list[dict[str, Any]]:
        """Return the parsed log, with the lines of all replies that `notify` has returned.

        Every line must be JSON. A worker writes its lines in order, but after the reply.
        """
        eventually(self._has_logged_replies)
        return self._lines()

    def _has_logged_replies(self) -> bool:
        logged = {line["request_id"] for line in self._lines() if line["message"] == "request"}
        return logged.issuperset(self._replied)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the process to exit, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()  # its workers notice and exit
            self.process.wait()
            raise
