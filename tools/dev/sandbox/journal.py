"""The page's data: the log's lines, the form's requests and the providers' messages."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import requests

from tools.dev.mock_provider import MockProvider
from tools.dev.sandbox.breakers import Breakers, local_session
from tools.dev.sandbox.notifications import Line, Seen, Sent, joined, parse_line

SHOWN = 30
KEPT = 200  # lines and requests; each provider keeps as many messages
PRECISION = 0.002  # of a log line's times, in seconds
REPLY_TIMEOUT = 60.0  # the service's own deadline comes first


class ServiceUnreachable(Exception):
    """The service gave no answer."""


class Journal:
    """Records the notifications of a service and its `providers`.

    Any thread may use it. `_lock` guards the lines, the form's requests and the time of the last
    `clear`.
    """

    def __init__(self, service: str, providers: Sequence[MockProvider]) -> None:
        self.service = service.rstrip("/")
        self.providers = providers
        self._breakers = Breakers(self.service)
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque(maxlen=KEPT)
        self._sent: dict[str, Sent] = {}
        self._cleared_at = 0.0
        self._reads_log = False

    def heard(self, entry: Mapping[str, Any]) -> None:
        """Take one parsed line of the service's log; keep it if it is a notification's."""
        if entry.get("level") in ("DEBUG", "INFO"):  # else LOG_LEVEL omits most requests
            self._reads_log = True
        line = parse_line(entry)
        with self._lock:
            if line and line.began + PRECISION >= self._cleared_at:
                self._lines.append(line)

    def state(self) -> dict[str, Any]:
        """Return the page's data."""
        breakers = self._breakers.states()
        with self._lock:
            lines, sent = [*self._lines], [*self._sent.values()]
        seen = [Seen(own.name, message) for own in self.providers for message in own.messages]
        return {
            "service": self.service,
            "service_answers": breakers is not None,
            "reads_log": self._reads_log,
            "providers": [_shown(provider, breakers) for provider in self.providers],
            "notifications": joined(lines, sent, seen, SHOWN),
        }

    def send(self, recipient: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Send a notification through the service, and return its answer.

        Raises:
            ServiceUnreachable: the service did not answer.
            UnicodeEncodeError: a URL cannot have this recipient.
        """
        url = f"{self.service}/api/v1.0/recipient/{quote(recipient, safe='')}/notify"
        to, title, message = (str(fields.get(name, "")) for name in ("to", "title", "message"))
        sent = Sent(secrets.token_hex(16), time.time(), recipient, to, title, message)
        self._keep(sent)
        try:
            reply = _post(url, sent)
        except requests.RequestException as error:
            with self._lock:
                self._sent.pop(sent.request_id, None)
            raise ServiceUnreachable from error
        self._keep(replace(sent, status=reply.status_code))
        return {
            "status": reply.status_code,
            "reason": reply.reason,
            "body": reply.text,
            "request_id": reply.headers.get("X-Request-Id", ""),
        }

    def clear(self) -> None:
        """Forget all notifications and messages, those under way included."""
        with self._lock:
            self._cleared_at = time.time()
            self._lines.clear()
            self._sent.clear()
        for provider in self.providers:
            provider.clear()

    def _keep(self, sent: Sent) -> None:
        """Keep a request or its answered successor, unless it has been cleared."""
        with self._lock:
            if sent.began >= self._cleared_at:
                self._sent[sent.request_id] = sent
            while len(self._sent) > KEPT:
                del self._sent[next(iter(self._sent))]


def _post(url: str, sent: Sent) -> requests.Response:
    texts = {"to": sent.to, "title": sent.title, "message": sent.message}
    headers = {"X-Request-Id": sent.request_id}
    with local_session() as session:
        return session.post(url, json=texts, headers=headers, timeout=REPLY_TIMEOUT)


def _shown(provider: MockProvider, breakers: Mapping[int, str] | None) -> dict[str, Any]:
    breaker = "unknown" if breakers is None else breakers.get(provider.port, "none")
    return {
        "name": provider.name,
        "port": provider.port,
        "behaviour": provider.behaviour,
        "delay": provider.state["delay"],
        "breaker": breaker,
        "accepted": provider.accepted,
        "received": provider.total,
    }
