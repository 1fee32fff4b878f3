"""Callers that keep their connections, each with one request under way, in a process of their own.

    python -m tools.bench.load ORDERS    # JSON, of what `main` takes; prints turns as JSON

What it costs is not counted, but it shares the CPUs with what is measured, so it does little.
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
from tools.bench.turns import PATIENCE, Order, Turn

BODY = b'{"to": "buyer@example.com", "title": "Sold", "message": "Your bicycle is sold."}'

# How long a caller who was refused waits; less than a `Retry-After`, so that the load stays.
PAUSE = 0.1

OK, REFUSED = 200, 503
CLOSED = 0  # stands for the status where the connection ended instead

# How often callers connect anew because the workers got uneven shares of them.
ATTEMPTS = 20

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Caller:
    """A connection, and the request under way on it."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request
        self.connect()

    def connect(self) -> None:
        """Open the connection."""
        self.sock = socket.create_connection((HOST, self._port), timeout=PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def send(self) -> None:
        """Begin a request."""
        self.began = time.perf_counter()
        with suppress(OSError):  # the peer has closed, which reading will tell
            self.sock.sendall(self._request)

    def read(self) -> tuple[int, bool] | None:
        """Return the status, and whether the connection is kept, once the reply is complete."""
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
    """Carries out an order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._turn = Turn()
        self._errors: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._under_way = 0
        self._last_reply = 0.0
        self._stopping = False
        self._paused: deque[tuple[float, Caller]] = deque()

    def run(self) -> Turn:
        """Return what was counted; at its beginning and at its end as much is under way."""
        order = self._order
        for _ in range(ATTEMPTS):
            if self._warm_up() >= order.evenness:
                break
            self.hang_up()
        else:
            self._warm_up()
        self._turn = counted = Turn(errors=self._errors)
        with system_calls(order.pids if order.trace else ()) as calls:
            self._count(counted)
        counted.calls, counted.problem = calls.by_name, calls.problem
        self.hang_up()
        return counted

    def begin(self) -> None:
        """Let all callers connect and call, and then rest, connected."""
        self._warm_up()
        self._rest()

    def burst(self) -> Turn:
        """Let all callers call, and rest; return what was counted, from rest to rest."""
        self._turn = counted = Turn(errors=self._errors)
        switched = switches(self._order.pids)
        cpu, began = cpu_seconds(self._order.pids), time.perf_counter()
        for caller in self._callers():
            self._begin(caller)
        self._go_on(self._order.count, self._order.seconds)
        self._rest()
        counted.seconds = self._last_reply - began
        counted.cpu = cpu_seconds(self._order.pids) - cpu
        counted.voluntary, counted.involuntary = growth(switched, switches(self._order.pids))
        return counted

    def _count(self, counted: Turn) -> None:
        order = self._order
        switched = switches(order.pids)
        cpu, began = cpu_seconds(order.pids), time.perf_counter()
        self._go_on(order.count, order.seconds)
        # Not until now: at a provider that is slow replies come in waves.
        counted.seconds = self._last_reply - began
        counted.cpu = cpu_seconds(order.pids) - cpu
        counted.voluntary, counted.involuntary = growth(switched, switches(order.pids))

    def _warm_up(self) -> float:
        """Let all callers connect and call; return how evenly the workers share them."""
        order = self._order
        before = [cpu_seconds([pid]) for pid in order.pids]
        for _ in range(order.callers):
            self._begin(self._watched(Caller(order.port, _request(order.path))))
        self._go_on(order.warm_up, PATIENCE)
        used = [cpu_seconds([pid]) - since for pid, since in zip(order.pids, before, strict=True)]
        return evenness(used, order.workers)

    def _go_on(self, count: int, seconds: float) -> None:
        """Let the callers call until there are so many replies, or the time is over."""
        end = time.perf_counter() + seconds
        while len(self._turn.latencies) < count and (left := end - time.perf_counter()) > 0:
            self._wait(left)
            while self._paused and self._paused[0][0] <= time.perf_counter():
                self._begin(self._paused.popleft()[1])

    def hang_up(self) -> None:
        """Wait for what is under way, so that what comes next begins with nothing."""
        self._turn = Turn()
        self._rest()
        for caller in self._callers():
            self._selector.unregister(caller.sock)
            caller.sock.close()
        self._turn = Turn()

    def _rest(self) -> None:
        """Wait for what is under way."""
        self._stopping = True
        end = time.perf_counter() + PATIENCE
        while self._under_way and (left := end - time.perf_counter()) > 0:
            self._wait(left)
        self._stopping = False
        self._paused.clear()

    def _callers(self) -> list[Caller]:
        return [key.data for key in self._selector.get_map().values()]

    def _wait(self, seconds: float) -> None:
        """Take the replies that are there, or the first to come."""
        if self._paused:
            seconds = min(seconds, self._paused[0][0] - time.perf_counter())
        for key, _ in self._selector.select(max(0.0, seconds)):
            caller: Caller = key.data
            if reply := caller.read():
                self._take(caller, *reply)

    def _take(self, caller: Caller, status: int, kept: bool) -> None:
        self._last_reply = now = time.perf_counter()
        self._under_way -= 1
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
            self._watched(caller)
        if self._stopping:
            return
        if status == OK:
            self._begin(caller)
        else:
            self._paused.append((now + PAUSE, caller))

    def _begin(self, caller: Caller) -> None:
        caller.send()
        self._under_way += 1

    def _watched(self, caller: Caller) -> Caller:
        self._selector.register(caller.sock, selectors.EVENT_READ, caller)
        return caller


def _request(path: str) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\n\r\n"
    )
    return head.encode() + BODY


def evenness(used: Sequence[float], workers: int) -> float:
    """Return the least that one of so many workers used, as a part of an equal share.

    Processes beyond them, the master say, use less than any worker.
    """
    busiest = sorted(used, reverse=True)[:workers]
    return min(busiest) * workers / sum(busiest) if any(busiest) else 1.0


def in_turns(orders: Sequence[Order], rounds: int) -> list[list[Turn]]:
    """Return each order's bursts; in every other round the last order comes first."""
    loads = [Load(order) for order in orders]
    for load in loads:
        load.begin()
    bursts: list[list[Turn]] = [[] for _ in orders]
    for number in range(rounds):
        for index in [*range(len(loads))][:: -1 if number % 2 else 1]:
            bursts[index].append(loads[index].burst())
    for load in loads:
        load.hang_up()
    return bursts


def main(orders: list[dict[str, Any]], rounds: int) -> None:
    """Carry out the only order, or let orders have so many bursts; print the turns."""
    parsed = [Order(**order) for order in orders]
    turns: list[Any] = in_turns(parsed, rounds) if rounds else [Load(parsed[0]).run()]
    print(json.dumps(turns, default=asdict))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
