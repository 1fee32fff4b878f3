"""Byte streams to a peer, plain and over TLS. Every wait ends at the deadline of a `Budget`.

A socket's own timeout bounds a single operation, so a peer that sends one byte a second never
exceeds it. Here each operation gets the time that is left for all of them. TLS uses
`ssl.MemoryBIO`, so OpenSSL itself never waits for the peer.
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

# Each read counts as at least this many bytes, because a flood of tiny reads costs CPU.
MIN_READ_BYTES = 256

# Maximum bytes per read: the size of the largest TLS record.
READ_BYTES = 16 * 1024

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo returns them

# Position of tcpi_bytes_acked and tcpi_bytes_received in Linux's struct tcp_info.
_COUNTS = struct.Struct("=120xQQ")


class Overlong(Exception):
    """The peer sent more bytes than are allowed."""


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
        """Return the seconds left, always more than 0.

        Raises:
            TimeoutError: the deadline has passed.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    def begin_phase(self) -> None:
        """Reset the bytes that may be read to `PHASE_BYTES`."""
        self._bytes = PHASE_BYTES

    def extend(self, count: int) -> None:
        """Allow `count` more bytes to be read."""
        self._bytes += count

    def spend(self, count: int) -> None:
        """Subtract `count` bytes that were read.

        Raises:
            Overlong: more bytes were read than allowed.
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
        """Return at least one byte from the peer, or `b""` once the peer has ended its side.

        Raises:
            TimeoutError: the deadline passed.
            OSError: the connection is broken.
            Overlong: the peer sent more bytes than are allowed.
        """

    def has_unread(self) -> bool:
        """Return True if bytes were received that `receive` has not returned yet."""

    def close(self) -> None: ...


class Look(NamedTuple):
    """The kernel's view of a connection.

    `is_quiet` is True if the peer has sent neither unread data nor a FIN. `acknowledged` is the
    number of bytes that the peer's kernel has acknowledged, None if our kernel does not report it.
    """

    is_quiet: bool
    acknowledged: int | None


class Plain:
    """A connected socket. It waits only by `poll`, so that deadlines hold.

    The kernel would restart its own receive timeout each time the process is stopped.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.has_sent = False  # a byte, since the caller last cleared it
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
                self.has_sent = True
            except BlockingIOError:  # the kernel's send buffer is full
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
        """Return the kernel's view of the connection."""
        info = self._tcp_info()
        if len(info) < _COUNTS.size:  # not Linux, or an old kernel
            return Look(not self._wait_for(select.POLLIN, 0), None)
        acknowledged, received = _COUNTS.unpack(info)
        return Look(received == self._received, acknowledged)  # a FIN counts as one byte

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
    """TLS over another stream, which may itself be TLS to a proxy.

    Args:
        host: the name or address that the peer's certificate must match.

    Raises:
        OSError: the handshake failed or timed out, or the certificate is not trusted.
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
        """Run `step` to its end, with the sends and receives that it needs; return its result."""
        while True:
            try:
                result = step(*args)
            except ssl.SSLWantReadError:
                self._flush(budget)
                self._feed(budget)
            except ssl.SSLError:
                with suppress(OSError):  # try to send the TLS alert
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
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the peer closed the connection during TLS")
        self._incoming.write(data)


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Return the addresses of `host`; may block longer than any deadline."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def connect(budget: Budget, addresses: list[Address]) -> Plain:
    """Return a stream to the first address that accepts; each gets its share of the time left.

    Raises:
        OSError: no address accepted the connection. The error is that of the first address:
            `getaddrinfo` puts addresses that this machine cannot reach last.
    """
    errors: list[OSError] = []
    for left in range(len(addresses), 0, -1):
        *kind, _, address = addresses[-left]
        try:
            return _connect(kind, address, budget.time_left() / left)
        except OSError as error:
            errors.append(error)
    raise errors[0] if errors else OSError("the name has no address")


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
