"""The service as operators run it: gunicorn in the repository's root, configured by environment."""

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

ROOT = Path(__file__).parent.parent
MESSAGE = {"to": "buyer@example.com", "title": "Hello", "message": "It is on its way."}
START_SECONDS = 30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """What a process needs that knows nothing of the tests' own environment."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


class Service:
    """A running gunicorn; its log goes to the file `log`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"service-{self.port}.log"
        ours = {"HTTP_SERVER_PORT": str(self.port), "WEB_CONCURRENCY": "2", "LOG_LEVEL": "DEBUG"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn"],
                cwd=ROOT,
                env=clean_environment() | ours | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> "Service":
        """Return once every worker answers."""
        give_up = time.monotonic() + START_SECONDS
        while len(self.booted()) < self.workers_wanted() or not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.05)
        return self

    def workers_wanted(self) -> int:
        return int(psutil.Process(self.process.pid).environ().get("WEB_CONCURRENCY", 2))

    def booted(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/healthz", timeout=5).ok
        except requests.ConnectionError:
            return False

    def notify(self, recipient: str = "buyer", **options: Any) -> requests.Response:
        """Post `MESSAGE`, or what `options` say, and return the reply."""
        url = f"{self.url}/api/v1.0/recipient/{recipient}/notify"
        return requests.post(url, **({"json": MESSAGE, "timeout": 30} | options))

    def send_raw(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Send bytes as they are and return all that comes back until the service closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            reply = b""
            while chunk := sock.recv(65536):
                reply += chunk
            return reply

    def lines(self) -> list[dict[str, Any]]:
        """Return the log, each line of which must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)
