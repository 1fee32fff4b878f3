"""Mock providers that use almost no CPU: one thread, fixed answers, kept connections.

    python -m tools.bench.sink

Prints one line of JSON with the port of each kind, then serves until standard input ends.
"""

import json
import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from tools import HOST


class Kind(NamedTuple):
    """A provider's answer: its status, and its delay in seconds."""

    status: int = 200
    delay: float = 0.0


KINDS = {
    "fast": Kind(),
    "medium": Kind(delay=0.05),
    "slow": Kind(delay=0.1),
    "failing": Kind(status=500),
}

# An answer may be sent this many seconds early: epoll rounds its wait up to whole milliseconds.
EARLY = 0.0005


class Connection:
    """A caller's connection, with the received part of its request."""

    def __init__(self, sock: socket.socket, listener: "Listener") -> None:
        self.sock = sock
        self.listener = listener
        self._received = b""

    def request_is_complete(self, data: bytes) -> bool:
        """Add received data; return True once the request is complete."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or len(body) < content_length(head):
            return False
        self._received = b""
        return True

    def answer(self) -> None:
        with suppress(OSError):  # the caller has disconnected; the selector will report it
            self.sock.send(self.listener.reply)


class Listener:
    """A listening port, its fixed answer, and the delayed answers in the order of their time."""

    def __init__(self, kind: Kind) -> None:
        self.sock = socket.create_server((HOST, 0), backlog=1024)
        self.delay = kind.delay
        self.reply = (
            f"HTTP/1.1 {kind.status} Whatever\r\n"
            "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        ).encode()
        self.due: deque[tuple[float, Connection]] = deque()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.sock.getsockname()[1])

    def answer_due(self, now: float) -> None:
        while self.due and self.due[0][0] <= now:
            self.due.popleft()[1].answer()


def content_length(head: bytes) -> int:
    """Return a head's Content-Length, 0 if it has none."""
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


class Sink:
    """Serves all listeners in one thread, until the file descriptor `end` is readable."""

    def __init__(self, listeners: list[Listener], end: int) -> None:
        self._listeners = listeners
        self._end = end
        self._selector = selectors.DefaultSelector()
        self._selector.register(end, selectors.EVENT_READ)
        for listener in listeners:
            self._selector.register(listener.sock, selectors.EVENT_READ, listener)

    def run(self) -> None:
        """Serve until the end."""
        while True:
            for key, _ in self._selector.select(self._wait()):
                if key.fd == self._end:
                    return
                if isinstance(key.data, Listener):
                    self._accept(key.data)
                else:
                    self._read(key.data)
            now = time.monotonic() + EARLY
            for listener in self._listeners:
                listener.answer_due(now)

    def _wait(self) -> float | None:
        first = [listener.due[0][0] for listener in self._listeners if listener.due]
        return max(0.0, min(first) - EARLY - time.monotonic()) if first else None

    def _accept(self, listener: Listener) -> None:
        sock, _ = listener.sock.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(sock, selectors.EVENT_READ, Connection(sock, listener))

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection.sock)
            connection.sock.close()
        elif connection.request_is_complete(data):
            listener = connection.listener
            if listener.delay:
                listener.due.append((time.monotonic() + listener.delay, connection))
            else:
                connection.answer()


def main() -> None:
    """Serve all kinds of providers."""
    listeners = {name: Listener(kind) for name, kind in KINDS.items()}
    print(json.dumps({name: one.port for name, one in listeners.items()}), flush=True)
    Sink([*listeners.values()], sys.stdin.fileno()).run()


if __name__ == "__main__":
    main()
