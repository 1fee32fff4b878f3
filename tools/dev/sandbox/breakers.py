"""The states of the service's circuit breakers, read from its `/metrics`."""

import threading
import time
from collections.abc import Callable, Mapping

import requests
from prometheus_client.parser import text_string_to_metric_families

EVERY = 0.5  # seconds between two readings, however many pages look
TIMEOUT = 1.0

_SAMPLE = "circuit_breaker_state{"
_SEVERITY = ("closed", "half-open", "open")


class Breakers:
    """Reads the states when asked, at most once per EVERY. Any thread may ask."""

    def __init__(self, service: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = f"{service}/metrics"
        self._clock = clock
        self._lock = threading.Lock()  # guards _due
        self._due = clock()
        self._states: Mapping[int, str] | None = None

    def states(self) -> Mapping[int, str] | None:
        """Return the state by the provider's port; None if the service does not answer."""
        with self._lock:
            is_due = self._clock() >= self._due
            if is_due:
                self._due = self._clock() + EVERY
        if is_due:
            self._states = self._read()
        return self._states

    def _read(self) -> Mapping[int, str] | None:
        try:
            with local_session() as session:
                reply = session.get(self._url, timeout=TIMEOUT)
                return parse_states(reply.text) if reply.ok else None
        except (requests.RequestException, ValueError):  # no answer, or no metrics
            return None


def local_session() -> requests.Session:
    """Return a session that asks no proxy: the service is local."""
    session = requests.Session()
    session.trust_env = False
    return session


def parse_states(page: str) -> dict[int, str]:
    """Return `closed`, `open` or `half-open` by port; the worst where hosts share a port.

    The service may reach a provider by a host name that the sandbox does not know.
    """
    lines = [line for line in page.splitlines() if line.startswith(_SAMPLE)]
    families = text_string_to_metric_families("\n".join([*lines, ""]))
    samples = [sample for family in families for sample in family.samples]
    by_port = {}
    for sample in sorted(samples, key=lambda sample: _SEVERITY.index(sample.labels["state"])):
        by_port[int(sample.labels["host"].rpartition(":")[2])] = sample.labels["state"]
    return by_port
