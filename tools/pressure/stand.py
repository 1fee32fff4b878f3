"""A checkout to put under pressure, its callers, and the rows of the table."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import requests

from tools import rig
from tools.bench import stacks
from tools.dev import postgres
from tools.rig import MESSAGE, Environment, Service, path_of

BUYER, SELLER = path_of("buyer"), path_of("seller")


class Row(NamedTuple):
    """A figure, its goal, and whether it meets the goal: None without a goal."""

    measured: str
    goal: str
    figure: str
    met: bool | None = None


@dataclass(frozen=True)
class Stand:
    """A checkout, and what its service needs; `urls` are the mock providers by kind."""

    checkout: Path
    server: postgres.Server
    urls: dict[str, str]
    _databases: dict[str, Environment] = field(default_factory=dict)

    def service(
        self, workers: int, provider: str = "fast", through: Sequence[str] = (), **variables: str
    ) -> AbstractContextManager[Service]:
        """Run the checkout's service with a provider of this kind for each channel."""
        database = self._database(provider)
        return rig.service(database | variables, workers, folder=self.checkout, through=through)

    def _database(self, provider: str) -> Environment:
        if provider not in self._databases:
            url = self.urls[provider]
            database = stacks.database(self.server, [url], url, self.checkout)
            self._databases[provider] = database
        return self._databases[provider]


class Scenario(NamedTuple):
    """A kind of pressure, and the measurement of a checkout's service under it."""

    pressure: str
    measure: Callable[[Stand], Iterator[Row]]


# --- callers


class Answer(NamedTuple):
    """The status of an answer, 0 for none, and its time in seconds."""

    status: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the request succeeded."""
        return self.status == HTTPStatus.OK


def notify(url: str, path: str = BUYER, timeout: float = 20.0) -> Answer:
    """Send a notification over a new connection."""
    return _timed(lambda: requests.post(url + path, json=MESSAGE, timeout=timeout))


def get(url: str, timeout: float) -> Answer:
    """Get a page over a new connection."""
    return _timed(lambda: requests.get(url, timeout=timeout))


def _timed(call: Callable[[], requests.Response]) -> Answer:
    began, status = time.monotonic(), 0
    with suppress(requests.RequestException):
        status = call().status_code
    return Answer(status, time.monotonic() - began)


def at_once(count: int, call: Callable[[], Answer]) -> list[Answer]:
    """Return the answers of `count` calls that begin at the same time."""
    with ThreadPoolExecutor(count) as pool:
        return [done.result() for done in [pool.submit(call) for _ in range(count)]]


# --- rows


def all_ok(measured: str, answers: Sequence[Answer], within: float | None = None) -> Row:
    """Judge that every answer is 200, and came within so many seconds."""
    good = sum(one.ok and one.seconds <= (within or one.seconds) for one in answers)
    limit = f" within {within:g} s" if within else ""
    slowest = max(one.seconds for one in answers)
    figure = f"{good}; {statuses(answers)}; the slowest {1000 * slowest:.0f} ms"
    return Row(f"{measured}: 200{limit}", f"{len(answers)}", figure, good == len(answers))


def none(measured: str, count: int) -> Row:
    """Judge that something never happened."""
    return Row(measured, "0", str(count), count == 0)


def statuses(answers: Iterable[Answer]) -> str:
    """Return how often each status came."""
    counts = Counter(str(one.status or "no answer") for one in answers)
    return ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
