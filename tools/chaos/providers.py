"""Providers on real sockets that misbehave as they are told, and record the requests they get."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader

from notifier.models import Channel
from tools import HOST
from tools.chaos.evidence import Delivery

ACCEPTS = "accepts"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a TCP reset

OK = b"HTTP/1.1 200 OK\r\n"
ANSWER = OK + b"Content-Length: 2\r\n\r\n{}"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"

BYTES_APART = 0.1  # seconds between dripped bytes
FLAPPING = 0.15
IDLE = 0.02
SLOW, LATE = 0.2, 1.0
TIMEOUT = 20.0  # by then a caller has disconnected, or is broken


class Peer:
    """The provider's side of a connection, for one request."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self.accepted = False
        self._sock = sock
        self._stopping = stopping

    def send(self, data: bytes, after: float = 0.0) -> None:
        """Send data after `after` seconds; a whole 2xx status line accepts the message."""
        self._stopping.wait(after)
        self._sock.sendall(data)
        self.accepted = self.accepted or data.startswith(OK)

    def drip(self, beginning: bytes, byte: bytes) -> None:
        """Send `beginning` and then `byte` repeatedly, until the caller disconnects."""
        give_up = time.monotonic() + TIMEOUT
        self.send(beginning)
        while time.monotonic() < give_up and not self._stopping.wait(BYTES_APART):
            self.send(byte)
        raise ConnectionAbortedError

    def flap(self) -> None:
        """Accept for a moment, and refuse for the next."""
        self.send(ANSWER if int(time.monotonic() / FLAPPING) % 2 else REFUSAL)

    def hang(self) -> None:
        """Send nothing until the caller disconnects."""
        self._sock.settimeout(TIMEOUT)
        self._sock.recv(1)
        raise ConnectionAbortedError

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        raise ConnectionAbortedError

    def accept_and_close(self) -> None:
        """Accept, and soon close the idle connection without having announced it."""
        self.send(ANSWER)
        self._stopping.wait(IDLE)
        raise ConnectionAbortedError


BEHAVIOURS: dict[str, Callable[[Peer], None]] = {
    ACCEPTS: lambda peer: peer.send(ANSWER),
    "accepts slowly": lambda peer: peer.send(ANSWER, after=SLOW),
    "accepts too late": lambda peer: peer.send(ANSWER, after=LATE),
    "answers 503": lambda peer: peer.send(REFUSAL),
    "flaps": Peer.flap,
    "hangs": Peer.hang,
    "drips its status": lambda peer: peer.drip(b"HTTP/1.1 200 ", b"O"),
    "drips headers": lambda peer: peer.drip(OK, b"x"),
    "drips its body": lambda peer: peer.drip(OK + b"Content-Length: 1000\r\n\r\n", b" "),
    "resets": Peer.reset,
    "closes idle connections": Peer.accept_and_close,
}


class Provider:
    """Listens on a free port; `behaviour` is one of BEHAVIOURS, and may be set at any time.

    The threads of its connections share `deliveries`, to which they only append, and the open
    sockets, of which one thread adds and one thread removes each.
    """

    def __init__(self, channel: Channel, deliveries: list[Delivery]) -> None:
        self.channel = channel
        self.behaviour = ACCEPTS
        self._deliveries = deliveries
        self._stopping = threading.Event()
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.host = f"{HOST}:{self._listener.getsockname()[1]}"
        self.url = f"http://{self.host}/send"
        self._open: dict[socket.socket, threading.Thread] = {}
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def stop(self) -> None:
        """Close the listener and all connections; on return every delivery is recorded."""
        self._stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not wake accept()
        self._accepting.join()
        self._listener.close()
        for sock, thread in [*self._open.items()]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._open[sock] = thread
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError, ValueError), sock, sock.makefile("rb") as reader:
            while request_id := _read_request(reader):
                self._answer(Peer(sock, self._stopping), request_id)
        del self._open[sock]

    def _answer(self, peer: Peer, request_id: str) -> None:
        received, behaviour = time.time(), self.behaviour
        try:
            BEHAVIOURS[behaviour](peer)
        finally:
            self._deliveries.append(
                Delivery(self.channel, self.host, request_id, received, behaviour, peer.accepted)
            )


def _read_request(reader: BufferedReader) -> str | None:
    """Return the id of the next request once it is complete; None if that does not happen."""
    if not reader.readline():
        return None
    headers = {}
    while line := reader.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers["content-length"])
    return headers["x-request-id"] if len(reader.read(length)) == length else None
