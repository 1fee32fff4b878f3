"""What a run leaves behind: what callers and providers saw, and what the workers logged."""

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
    """What a caller got; the status is 0 without an answer, `cut` if the connection ended."""

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
        """When the answer was complete, or the connection gone."""
        return self.began + self.seconds


class Delivery(NamedTuple):
    """A request that a provider has read to its end; `accepted` once a 2xx status line was sent."""

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
    times: int | None = None  # what the line stands for


class Absence(NamedTuple):
    """A time in which no active row had the host."""

    host: str
    began: float
    ended: float


class Size(NamedTuple):
    """How many workers there are, and the most that one of them has."""

    workers: int
    threads: int
    files: int  # the connections to providers left out
    to_providers: int  # connections
    memory: int  # bytes of its own


class Period(NamedTuple):
    """A time in which nothing was made to fail, and the workers' size at its end."""

    began: float
    ended: float
    size: Size


@dataclass(frozen=True, slots=True)
class Limits:
    """What the run was to keep to; times in seconds."""

    deadline: float
    margin: float  # what a loaded machine may add to it
    open_seconds: float
    threads: int  # requests at a time per worker
    callers: int
    hosts: int
    kinds: frozenset[str]  # of faults
    requests: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the invariants are checked against."""

    limits: Limits
    replies: list[Reply]
    deliveries: list[Delivery]
    lines: list[Line]
    absences: list[Absence]
    kills: list[float]
    faults: Counter[str]
    before: Period
    after: Period

    def lines_with(self, message: str) -> Iterator[Line]:
        """Yield the log lines with that message."""
        return (line for line in self.lines if line.message == message)

    def openings(self) -> list[Line]:
        """Return the lines that say that a breaker has opened."""
        return [line for line in self.lines_with(CHANGED) if line.to_state == "open"]

    def refusals(self) -> int:
        """Return how many attempts a breaker has refused, the last second's perhaps left out."""
        return sum(line.times or 1 for line in self.lines_with(SKIPPED))

    def fallbacks(self) -> int:
        """Return how many notifications were delivered although an attempt had failed."""
        failed = {line.request_id for line in self.lines_with(FAILED)}
        delivered = (one for one in self.replies if one.status == HTTPStatus.OK)
        return sum(reply.request_id in failed for reply in delivered)

    def accepted(self) -> dict[str, list[Delivery]]:
        """Return by request what was accepted."""
        accepted = defaultdict(list)
        for delivery in self.deliveries:
            if delivery.accepted:
                accepted[delivery.request_id].append(delivery)
        return accepted

    def known_of(self, request_id: str) -> list[str]:
        """Describe what everybody saw of one request."""
        records = (self.replies, self.deliveries, self.lines)
        return [str(one) for seen_by in records for one in seen_by if one.request_id == request_id]


def read_logs(folder: Path) -> list[Line]:
    """Return what the workers have logged that matters here, each worker's lines in their order."""
    return [line for path in sorted(folder.glob("worker-*.log")) for line in _read_log(path)]


def _read_log(path: Path) -> Iterator[Line]:
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n") and any(f'"{message}"' in text for message in MESSAGES):
            fields = json.loads(text)
            at = datetime.fromisoformat(fields["timestamp"]).timestamp()
            names = ("message", "request_id", "host", "reason", "to_state", "times")
            yield Line(path.stem, at, *(fields.get(name) for name in names))


def size(workers: list[psutil.Process], hosts: Container[str]) -> Size:
    """Measure the workers, which call `hosts`."""
    threads, files, to_providers, memory = zip(
        *(_size(worker, hosts) for worker in workers), strict=True
    )
    return Size(len(workers), max(threads), max(files), max(to_providers), max(memory))


def _size(worker: psutil.Process, hosts: Container[str]) -> tuple[int, int, int, int]:
    peers = [one.raddr for one in worker.net_connections("tcp4") if one.raddr]
    to_providers = sum(f"{peer.ip}:{peer.port}" in hosts for peer in peers)
    files = worker.num_fds() - to_providers
    return worker.num_threads(), files, to_providers, worker.memory_full_info().uss
