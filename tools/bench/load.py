"""The load generator: callers that keep their connections, each with one request in flight.

    python -m tools.bench.load ORDERS    # JSON with the arguments of `main`; prints turns as JSON

It runs in a process of its own. Its CPU is not counted, but it shares the machine with the measured
stack, so it does as little as possible.
"""

import json
import re
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tools import HOST
from tools.bench.counters import cpu_seconds, growth, switches, system_calls
from tools.bench.turns import TIMEOUT, Order, Turn

BODY = b'{"to": "buyer@example.com", "title": "Sold", "message": "Your bicycle is sold."}'

# Seconds that a caller pauses after a 503: less than `Retry-After` says, to keep up the load.
PAUSE = 0.1

OK, REFUSED = 200, 503
CLOSED = 0  # the status if the connection was closed without a reply

# How often callers reconnect because the workers' shares of them are uneven.
ATTEMPTS = 20

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Caller:
    """A connection, and the request in flight on it."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request
        self.connect()

    def connect(self) -> None:
        """Open the connection."""
        self.sock = socket.create_connection((HOST, self._port), timeout=TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def send(self) -> None:
        """Send a request."""
        self.began = time.perf_counter()
        with suppress(OSError):  # the peer has closed the connection; `read` will find out
            self.sock.sendall(self._request)

    def read(self) -> tuple[int, bool] | None:
        """Return status and whether the connection is kept, or None while data is missing."""
        try:
            data = self.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            return CLOSED, False
        received = self._received + data
        head, end, body = received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if end else None
        if length is None or len(body) < int(length[1]):
            self._received = received
            return None
        self._received = b""
        return int(head[9:12]), b"connection: close" not in head.lower()


class Load:
    """Executes an order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._turn = Turn()
        self._errors: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._in_flight = 0
        self._last_reply = 0.0
        self._stopping = False
        self._paused: deque[tuple[float, Caller]] = deque()

    def run(self) -> Turn:
        """Return the counted turn; all callers have a request in flight when it begins and ends."""
        order = self._order
        for _ in range(ATTEMPTS):
            if self._warm_up() >= order.evenness:
                break
            self.disconnect()
        else:
            self._warm_up()
        self._turn = counted = Turn(errors=self._errors)
        with system_calls(order.pids if order.trace else ()) as calls:
            self._count(counted)
        counted.calls, counted.problem = calls.by_name, calls.problem
        self.disconnect()
        return counted

    def begin(self) -> None:
        """Let all callers connect and call, then wait until they are idle."""
        self._warm_up()
        self._drain()

    def burst(self) -> Turn:
        """Let all callers call until the order's bounds, then drain; return the counted turn."""
        self._turn = counted = Turn(errors=self._errors)
        switched = switches(self._order.pids)
        cpu, began = cpu_seconds(self._order.pids), time.perf_counter()
        for caller in self._callers():
            self._begin(caller)
        self._call(self._order.count, self._order.seconds)
        self._drain()
        counted.seconds = self._last_reply - began
        counted.cpu = cpu_seconds(self._order.pids) - cpu
        counted.voluntary, counted.involuntary = growth(switched, switches(self._order.pids))
        return counted

    def _count(self, counted: Turn) -> None:
        order = self._order
        switched = switches(order.pids)
        cpu, began = cpu_seconds(order.pids), time.perf_counter()
        self._call(order.count, order.seconds)
        # Until the last reply, not until now: replies of a slow provider come in waves.
        counted.seconds = self._last_reply - began
        counted.cpu = cpu_seconds(order.pids) - cpu
        counted.voluntary, counted.involuntary = growth(switched, switches(order.pids))

    def _warm_up(self) -> float:
        """Let all callers connect and call; return how evenly the workers shared the load."""
        order = self._order
        before = [cpu_seconds([pid]) for pid in order.pids]
        for _ in range(order.callers):
            self._begin(self._register(Caller(order.port, request_to(order.path))))
        self._call(order.warm_up, TIMEOUT)
        used = [cpu_seconds([pid]) - since for pid, since in zip(order.pids, before, strict=True)]
        return evenness(used, order.workers)

    def _call(self, count: int, seconds: float) -> None:
        """Let the callers call until `count` replies have come or `seconds` have passed."""
        end = time.perf_counter() + seconds
        while len(self._turn.latencies) < count and (left := end - time.perf_counter()) > 0:
            self._wait(left)
            while self._paused and self._paused[0][0] <= time.perf_counter():
                self._begin(self._paused.popleft()[1])

    def disconnect(self) -> None:
        """Wait for the replies in flight, then close all connections."""
        self._turn = Turn()
        self._drain()
        for caller in self._callers():
            self._selector.unregister(caller.sock)
            caller.sock.close()
        self._turn = Turn()

    def _drain(self) -> None:
        """Wait for the replies in flight, and send no new requests."""
        self._stopping = True
        end = time.perf_counter() + TIMEOUT
        while self._in_flight and (left := end - time.perf_counter()) > 0:
            self._wait(left)
        self._stopping = False
        self._paused.clear()

    def _callers(self) -> list[Caller]:
        return [key.data for key in self._selector.get_map().values()]

    def _wait(self, seconds: float) -> None:
        """Take the replies that are ready, or wait up to `seconds` for the first."""
        if self._paused:
            seconds = min(seconds, self._paused[0][0] - time.perf_counter())
        for key, _ in self._selector.select(max(0.0, seconds)):
            caller: Caller = key.data
            if reply := caller.read():
                self._take(caller, *reply)

    def _take(self, caller: Caller, status: int, kept: bool) -> None:
        self._last_reply = now = time.perf_counter()
        self._in_flight -= 1
        if status == OK:
            self._turn.latencies.append(1000 * (now - caller.began))
        elif status == REFUSED:
            self._turn.refused += 1
        else:
            error = str(status or "closed")
            self._errors[error] = self._errors.get(error, 0) + 1
        if not kept:
            self._selector.unregister(caller.sock)
            caller.connect()
            self._register(caller)
        if self._stopping:
            return
        if status == OK:
            self._begin(caller)
        else:
            self._paused.append((now + PAUSE, caller))

    def _begin(self, caller: Caller) -> None:
        caller.send()
        self._in_flight += 1

    def _register(self, caller: Caller) -> Caller:
        self._selector.register(caller.sock, selectors.EVENT_READ, caller)
        return caller


def request_to(path: str) -> bytes:
    """Return a notification to `path`, as bytes."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


def evenness(used: Sequence[float], workers: int) -> float:
    """Return the least CPU that a worker used, relative to an equal share.

    The busiest processes are taken for the workers, as the master uses less than any of them.
    """
    busiest = sorted(used, reverse=True)[:workers]
    return min(busiest) * workers / sum(busiest) if any(busiest) else 1.0


def run_bursts(orders: Sequence[Order], rounds: int) -> list[list[Turn]]:
    """Return each order's bursts; every other round runs the orders in reverse."""
    loads = [Load(order) for order in orders]
    for load in loads:
        load.begin()
    bursts: list[list[Turn]] = [[] for _ in orders]
    for number in range(rounds):
        for index in [*range(len(loads))][:: -1 if number % 2 else 1]:
            bursts[index].append(loads[index].burst())
    for load in loads:
        load.disconnect()
    return bursts


def main(orders: list[dict[str, Any]], rounds: int) -> None:
    """Execute the only order, or `rounds` bursts of each order; print the turns."""
    parsed = [Order(**order) for order in orders]
    turns: list[Any] = run_bursts(parsed, rounds) if rounds else [Load(parsed[0]).run()]
    print(json.dumps(turns, default=asdict))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
