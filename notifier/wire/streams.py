"""Byte streams to a peer, plain and over TLS. Every wait ends at the deadline of a `Budget`.

A socket's own time-out bounds one operation: a peer that sends a byte a second is never late. Here
each operation asks what is left for all of them. TLS runs over memory (`ssl.MemoryBIO`), so OpenSSL
never waits for the peer by itself, whatever the peer sends.

`connect`, `TLS` and the two methods of a `Stream` are all that a client of another protocol needs.
"""

import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

# Maximum bytes to read in one phase: a handshake, a proxy's answer, an answer up to its status.
PHASE_BYTES = 64 * 1024

# Each read counts as at least this many bytes: a flood of single bytes costs CPU.
MIN_READ_BYTES = 256

# Bytes to read at once: the largest TLS record.
READ_BYTES = 16 * 1024

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo returns them

# Where Linux's struct tcp_info has tcpi_bytes_acked and tcpi_bytes_received.
_COUNTS = struct.Struct("=120xQQ")


class Overlong(Exception):
    """The peer sends more than is read."""


class Budget:
    """The time and bytes left for one exchange. Used by one thread.

    Args:
        deadline: on `time.monotonic()`.
    """

    __slots__ = ("_bytes", "deadline")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._bytes = PHASE_BYTES

    def time_left(self) -> float:
        """Return seconds, more than 0.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def begin_phase(self) -> None:
        """Let `PHASE_BYTES` be read from now on."""
        self._bytes = PHASE_BYTES

    def extend(self, count: int) -> None:
        """Let `count` more bytes be read."""
        self._bytes += count

    def spend(self, count: int) -> None:
        """Note that `count` bytes were read.

        Raises:
            Overlong: those were too many.
        """
        self._bytes -= max(count, MIN_READ_BYTES)
        if self._bytes < 0:
            raise Overlong


class Stream(Protocol):
    """Bytes to and from a peer."""

    def send(self, budget: Budget, data: bytes) -> None:
        """Send all of `data`.

        Raises:
            TimeoutError: the deadline passed before all was sent.
            OSError: the connection is broken.
        """

    def receive(self, budget: Budget) -> bytes:
        """Return at least one byte from the peer, or `b""` after its end.

        Raises:
            TimeoutError: the deadline passed.
            OSError: the connection is broken.
            Overlong: the peer sends more than is read.
        """

    def has_unread(self) -> bool:
        """Return True if bytes were received that `receive` has not returned."""

    def close(self) -> None: ...


class Look(NamedTuple):
    """What the kernel knows of a connection.

    `is_quiet` is True if the peer has sent nothing that was not read, its end included.
    `acknowledged` is how many bytes the peer's kernel has received, None where ours does not tell.
    """

    is_quiet: bool
    acknowledged: int | None


class Plain:
    """A connected socket. All waiting is done by `poll`, so that a deadline holds.

    The kernel's own time-out of a receive would start anew each time the process is stopped.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = 0
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)

    def send(self, budget: Budget, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            budget.time_left()
            try:
                rest = rest[self._sock.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:  # the kernel's buffer is full
                self._wait_for(select.POLLOUT, budget.time_left())

    def receive(self, budget: Budget) -> bytes:
        while True:
            if not self._readable.poll(1000 * budget.time_left()):
                raise TimeoutError("nothing was received in time")
            try:
                data = self._sock.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            self._received += len(data)
            budget.spend(len(data))
            return data

    def has_unread(self) -> bool:
        return False

    def close(self) -> None:
        self._sock.close()

    def look(self) -> Look:
        """Return what the kernel knows of the connection."""
        info = self._tcp_info()
        if len(info) < _COUNTS.size:  # another system, or an old kernel
            return Look(not self._wait_for(select.POLLIN, 0), None)
        acknowledged, received = _COUNTS.unpack(info)
        return Look(received == self._received, acknowledged)  # an end counts as a byte

    def _tcp_info(self) -> bytes:
        if not sys.platform.startswith("linux"):
            return b""
        return self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS.size)

    def is_reset(self, seconds: float) -> bool:
        """Return True if the peer's RST is here, or arrives within `seconds`."""
        return self._wait_for(0, seconds)

    def _wait_for(self, event: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._sock, event)
        return bool(poll.poll(1000 * seconds))


class TLS:
    """TLS over another stream, which may be TLS too: a proxy's.

    Args:
        host: the name or address that the peer's certificate must have.

    Raises:
        OSError: there was no handshake in time, or the certificate is not trusted.
    """

    def __init__(self, budget: Budget, below: Stream, context: ssl.SSLContext, host: str) -> None:
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._run(budget, self._tls.do_handshake)

    def send(self, budget: Budget, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._run(budget, self._tls.write, rest) :]

    def receive(self, budget: Budget) -> bytes:
        with suppress(ssl.SSLZeroReturnError):  # the peer's close_notify
            return bytes(self._run(budget, self._tls.read, READ_BYTES))
        return b""

    def has_unread(self) -> bool:
        return bool(self._incoming.pending or self._tls.pending() or self._below.has_unread())

    def close(self) -> None:
        self._below.close()

    def _run(self, budget: Budget, step: Callable[..., Any], *args: Any) -> Any:
        """Return the result of `step`, after as many sends and receives as that takes."""
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush(budget)
                self._feed(budget)
            except ssl.SSLError:
                with suppress(OSError):  # the peer may hear why
                    self._flush(budget)
                raise
            else:
                self._flush(budget)
                return result

    def _flush(self, budget: Budget) -> None:
        if self._outgoing.pending:
            self._below.send(budget, self._outgoing.read())

    def _feed(self, budget: Budget) -> None:
        data = self._below.receive(budget)
        if not data:
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection ended within TLS")
        self._incoming.write(data)


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Return the addresses of `host`, after however long that takes."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def connect(budget: Budget, addresses: list[Address]) -> Plain:
    """Return a stream to the first address that answers; each has its share of the time left.

    Raises:
        OSError: none did.
    """
    for left in range(len(addresses), 0, -1):
        *kind, _, address = addresses[-left]
        try:
            return _connect(kind, address, budget.time_left() / left)
        except OSError:
            if left == 1:
                raise
    raise OSError("the name has no address")


def _connect(kind: list[Any], address: Any, seconds: float) -> Plain:
    sock = socket.socket(*kind)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
    except OSError:
        sock.close()
        raise
    return Plain(sock)
