"""The evidence of a run: the records of callers and providers, and the workers' logs."""

import json
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ADMITTED = "breaker admits"
FAILED = "attempt failed"
SKIPPED = "provider skipped"
CHANGED = "circuit breaker changed state"
UNREAD = "preferences unavailable"
MESSAGES = frozenset({ADMITTED, FAILED, SKIPPED, CHANGED, UNREAD})


class Reply(NamedTuple):
    """A caller's reply; the status is 0 without an answer, and `cut` if the connection broke."""

    request_id: str
    recipient: str
    began: float  # time.time()
    seconds: float
    status: int
    body: Any = None  # parsed JSON
    headers: Mapping[str, str] = {}
    cut: bool = False

    @property
    def ended(self) -> float:
        """When the answer was complete, or the connection broke."""
        return self.began + self.seconds


class Delivery(NamedTuple):
    """A request that a provider read completely; `accepted` if it sent a whole 2xx status line."""

    channel: str
    host: str
    request_id: str
    received: float
    behaviour: str
    accepted: bool


class Line(NamedTuple):
    """A line of a worker's log."""

    worker: str
    at: float
    message: str
    request_id: str | None = None
    host: str | None = None
    reason: str | None = None  # why an attempt failed
    to_state: str | None = None
    times: int | None = None  # how many events the line stands for


class Absence(NamedTuple):
    """A period in which no active row had the host."""

    host: str
    began: float
    ended: float


class Size(NamedTuple):
    """The number of workers, and the maximum of each resource over the workers."""

    workers: int
    threads: int
    files: int  # without connections to providers
    to_providers: int  # connections to providers
    memory: int  # bytes that no other process shares


class Period(NamedTuple):
    """A period without faults, and the workers' size at its end."""

    began: float
    ended: float
    size: Size


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that a run must keep; times are in seconds."""

    deadline: float
    margin: float  # that a loaded machine may add to the deadline
    open_seconds: float
    threads: int  # concurrent requests per worker
    callers: int
    hosts: int
    kinds: frozenset[str]  # of faults
    requests: int  # at least


@dataclass(frozen=True, slots=True)
class Evidence:
    """All records against which the invariants are checked."""

    limits: Limits
    replies: list[Reply]
    deliveries: list[Delivery]
    lines: list[Line]
    absences: list[Absence]
    kills: list[float]
    faults: Counter[str]
    before: Period
    after: Period
    lines_dropped: int = 0
    left_out: str = ""  # why some faults are impossible on this machine

    def lines_with(self, message: str) -> Iterator[Line]:
        """Return the log lines with a message."""
        return (line for line in self.lines if line.message == message)

    def openings(self) -> list[Line]:
        """Return the log lines about breakers that opened."""
        return [line for line in self.lines_with(CHANGED) if line.to_state == "open"]

    def refusals(self) -> int:
        """Return how many attempts breakers refused, perhaps without those of the last second."""
        return sum(line.times or 1 for line in self.lines_with(SKIPPED) if line.reason == "open")

    def fallbacks(self) -> int:
        """Return how many notifications were delivered after an attempt had failed."""
        failed = {line.request_id for line in self.lines_with(FAILED)}
        delivered = (one for one in self.replies if one.status == HTTPStatus.OK)
        return sum(reply.request_id in failed for reply in delivered)

    def accepted(self) -> dict[str, list[Delivery]]:
        """Return the accepted deliveries of each request."""
        accepted = defaultdict(list)
        for delivery in self.deliveries:
            if delivery.accepted:
                accepted[delivery.request_id].append(delivery)
        return accepted

    def records_of(self, request_id: str) -> list[str]:
        """Return all records of one request as text."""
        sources = (self.replies, self.deliveries, self.lines)
        return [str(one) for source in sources for one in source if one.request_id == request_id]


def read_logs(folder: Path) -> list[Line]:
    """Return the relevant lines of all workers' logs; each worker's lines are in order."""
    return [line for path in sorted(folder.glob("worker-*.log")) for line in _read_log(path)]


def _read_log(path: Path) -> Iterator[Line]:
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n") and any(f'"{message}"' in text for message in MESSAGES):
            fields = json.loads(text)
            at = datetime.fromisoformat(fields["timestamp"]).timestamp()
            names = ("message", "request_id", "host", "reason", "to_state", "times")
            yield Line(path.stem, at, *(fields.get(name) for name in names))


def size(workers: list[psutil.Process], hosts: Container[str]) -> Size:
    """Measure the workers; `hosts` are the providers that they call."""
    threads, files, to_providers, memory = zip(
        *(_size(worker, hosts) for worker in workers), strict=True
    )
    return Size(len(workers), max(threads), max(files), max(to_providers), max(memory))


def _size(worker: psutil.Process, hosts: Container[str]) -> tuple[int, int, int, int]:
    peers = [one.raddr for one in worker.net_connections("tcp4") if one.raddr]
    to_providers = sum(f"{peer.ip}:{peer.port}" in hosts for peer in peers)
    files = worker.num_fds() - to_providers
    return worker.num_threads(), files, to_providers, worker.memory_full_info().uss
