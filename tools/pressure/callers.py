"""Pressure by callers: silent ones, half bodies, greedy ones; and the interim answer."""

import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from tools import HOST
from tools.bench.figures import percentile
from tools.bench.load import BODY, Caller, request_to
from tools.crowd import crowd
from tools.pressure.greedy import greedy
from tools.pressure.stand import BUYER, Answer, Row, Stand, all_ok, at_once, get, notify
from tools.rig import Service

PROBES = ("/healthz", "/readyz", "/metrics")


# --- silent callers

SILENT, SILENT_WORKERS = 5_000, 4
ROUNDS = 10  # one a second: longer than a silent caller is kept
PROBE_TIMEOUT, AT_LEAST = 5.0, 1.0  # seconds


def silent(stand: Stand) -> Iterator[Row]:
    """Notify and probe while silent callers keep connections open."""
    with stand.service(SILENT_WORKERS) as service, crowd(service.port, SILENT):
        notifications, probes = _one_round_a_second(service.url)
    yield all_ok("notifications", notifications, within=AT_LEAST)
    for path, answers in probes.items():
        yield all_ok(path, answers, within=AT_LEAST)


def _one_round_a_second(url: str) -> tuple[list[Answer], dict[str, list[Answer]]]:
    with ThreadPoolExecutor(ROUNDS * (1 + len(PROBES))) as pool:
        sent: list[Future[Answer]] = []
        probed: dict[str, list[Future[Answer]]] = {path: [] for path in PROBES}
        for _ in range(ROUNDS):
            sent.append(pool.submit(notify, url, timeout=PROBE_TIMEOUT))
            for path in PROBES:
                probed[path].append(pool.submit(get, url + path, PROBE_TIMEOUT))
            time.sleep(1.0)
        answers = {path: [one.result() for one in calls] for path, calls in probed.items()}
        return [one.result() for one in sent], answers


# --- half bodies

HALF, OTHERS, HALF_WORKERS = 280, 31, 4
HALF_BODY = request_to(BUYER)[: 1 - len(BODY)].decode()  # a head and one byte
SETTLE = 0.5  # seconds in which the service reads what has arrived


def half_bodies(stand: Stand) -> Iterator[Row]:
    """Send notifications at once beside callers that never complete their bodies."""
    with stand.service(HALF_WORKERS) as service, crowd(service.port, HALF, HALF_BODY):
        time.sleep(SETTLE)
        answers = at_once(OTHERS, lambda: notify(service.url))
    yield all_ok(f"{OTHERS} notifications at once", answers)


# --- greedy callers

GREEDY, GREEDY_WORKERS = 600, 2
ALONE, BESIDE = 60, 120  # notifications of the polite caller
PAUSE = 0.05  # seconds between its reply and its next notification
POLITE_SECONDS = 12.0  # at most, for its notifications
MOST_SLOWER = 3.0


class Polite(NamedTuple):
    """The times of the polite caller's replies in milliseconds, of any status, and its 200s."""

    p50: float
    p99: float
    delivered: int
    replies: int

    def text(self) -> str:
        """Return the figures."""
        replies = f"{self.delivered} of {self.replies} are 200"
        return f"p50 {self.p50:.1f} ms, p99 {self.p99:.1f} ms, {replies}"


def greedy_fast(stand: Stand) -> Iterator[Row]:
    """Measure a polite caller beside greedy ones, with a provider that answers at once."""
    return _greedy(stand, "fast")


def greedy_slow(stand: Stand) -> Iterator[Row]:
    """Measure a polite caller beside greedy ones, with a provider that takes 50 ms."""
    return _greedy(stand, "medium")


def _greedy(stand: Stand, provider: str) -> Iterator[Row]:
    with stand.service(GREEDY_WORKERS, provider) as service:
        alone = _polite(service, ALONE)
        with greedy(service.port, GREEDY) as harvests:
            time.sleep(SETTLE)
            beside = _polite(service, BESIDE)
    ratio = beside.p50 / alone.p50
    yield Row("a polite caller alone", "", alone.text())
    yield Row("the polite caller beside them", "", beside.text())
    goal = f"< {MOST_SLOWER:g}"
    yield Row("its p50 beside / alone", goal, f"{ratio:.1f}", ratio < MOST_SLOWER)
    yield Row("its p99 beside / alone", "", f"{beside.p99 / alone.p99:.1f}")
    yield Row("replies to the greedy callers a second", "", harvests[0].text())


def _polite(service: Service, count: int) -> Polite:
    """Notify over a kept connection, with pauses."""
    caller = Caller(service.port, request_to(BUYER))
    answers: list[Answer] = []
    give_up = time.monotonic() + POLITE_SECONDS
    while len(answers) < count and time.monotonic() < give_up:
        time.sleep(PAUSE)
        answers.append(_ask(caller))
    caller.sock.close()
    times = [1000 * one.seconds for one in answers]
    delivered = sum(one.ok for one in answers)
    return Polite(percentile(times, 50), percentile(times, 99), delivered, len(times))


def _ask(caller: Caller) -> Answer:
    caller.send()
    while (reply := caller.read()) is None:
        pass
    answer = Answer(reply[0], time.perf_counter() - caller.began)
    if not reply[1]:
        caller.sock.close()
        caller.connect()
    return answer


# --- the interim answer

INTERIM = 20
SOON = 20.0  # milliseconds


def expect(stand: Stand) -> Iterator[Row]:
    """Measure how long callers that expect an interim answer wait for it."""
    with stand.service(1) as service:
        times = [1000 * _interim(service.port) for _ in range(INTERIM)]
    median = statistics.median(times)
    figure = f"median {median:.1f} ms, the longest {max(times):.1f} ms"
    yield Row("time until 100 Continue", f"median ≤ {SOON:g} ms", figure, median <= SOON)


def _interim(port: int) -> float:
    """Return the seconds until the interim answer; then complete the request."""
    head = request_to(BUYER).removesuffix(BODY)
    with socket.create_connection((HOST, port), timeout=PROBE_TIMEOUT) as sock:
        began = time.perf_counter()
        sock.sendall(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        with suppress(TimeoutError):
            sock.recv(65536)
        seconds = time.perf_counter() - began
        sock.sendall(BODY)
        sock.recv(65536)
    return seconds
