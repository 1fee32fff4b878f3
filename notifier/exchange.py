"""How one HTTP exchange is held to its deadline, name look-up included.

requests and urllib3 bound single socket operations: a peer that sends a byte a second is never
late, each resolved address gets the full connect time-out, and a name look-up has no bound at all.
Here one deadline holds for the whole exchange: its sockets set what is left before each operation.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from http.client import BadStatusLine, HTTPResponse, parse_headers
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

# What may be spent on an answer once its status line is known. The rest of the answer changes
# nothing; it is read only so that the connection can be used again.
DRAIN_SECONDS = 1.0

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo returns them


@dataclass(slots=True)
class Exchange:
    """What the sockets of one exchange share. Used by one thread only."""

    deadline: float  # time.monotonic()
    resolve: Callable[[str, int, float], list[Address]]  # host, port, seconds it may take
    stage: str = "url"  # how far it came: then dns, connect, tunnel (a proxy's), tls, sent
    status: int | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Let the sockets that this thread uses in the block find this exchange."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def time_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline of the exchange has passed")
        return left

    def sending(self) -> float:
        """Note that the provider is sent something, unless it is a proxy; return the time left."""
        if self.stage != "tunnel":
            self.stage = "sent"
        return self.time_left()

    def status_arrived(self, status: int) -> None:
        self.status = status
        self.deadline = min(self.deadline, time.monotonic() + DRAIN_SECONDS)

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a socket connected to the first address of `host` that answers.

        Each address gets its share of the time that is left.
        """
        self.stage = "dns"
        addresses = self._resolve(host, port)
        self.stage = "connect"
        for addresses_left in range(len(addresses), 0, -1):
            *how, _, address = addresses[-addresses_left]
            try:
                return _connected(how, address, self.time_left() / addresses_left)
            except OSError:
                if addresses_left == 1:
                    raise
        raise OSError("the name has no address")

    def _resolve(self, host: str, port: int) -> list[Address]:
        try:
            return look_up(host, port, socket.AI_NUMERICHOST)
        except socket.gaierror:  # no address but a name
            return self.resolve(host, port, self.time_left())


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Return the addresses of `host`, after however long it takes."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def _connected(how: list[Any], address: Any, seconds: float) -> socket.socket:
    sock = _BoundedSocket(*how)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


# Sockets and connections are made deep inside urllib3; this is how they find their exchange.
_current: ContextVar[Exchange] = ContextVar("exchange")


class _BoundedSocket(socket.socket):
    """A socket whose every operation ends at the deadline of the exchange it serves."""

    def recv(self, *args: Any) -> bytes:
        self.settimeout(_current.get().time_left())
        return super().recv(*args)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_current.get().time_left())
        return super().recv_into(*args)

    def send(self, *args: Any) -> int:
        self.settimeout(_current.get().sending())
        return super().send(*args)

    def sendall(self, *args: Any) -> None:
        # A plain socket's time-out is for the whole of sendall(); a TLS one loops over send().
        self.settimeout(_current.get().sending())
        super().sendall(*args)


class BoundedTLSSocket(_BoundedSocket, ssl.SSLSocket):
    """The same over TLS; an SSLContext makes it."""

    def do_handshake(self, block: bool = False) -> None:
        exchange = _current.get()
        exchange.stage = "tls"
        self.settimeout(exchange.time_left())
        super().do_handshake(block)


class _StatusFirst(HTTPResponse):
    """Reports its status before it reads the headers, which may never end.

    Interim answers are stepped over, as RFC 9110 section 15.2 has it; http.client knows only 100.
    """

    def _read_status(self) -> tuple[str, int, str]:
        line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        while line[1] < HTTPStatus.OK:
            if line[1] == HTTPStatus.SWITCHING_PROTOCOLS:
                raise BadStatusLine("nobody asked for another protocol")
            parse_headers(self.fp)
            line = super()._read_status()  # type: ignore[misc]
        exchange = _current.get()
        if exchange.stage == "sent":
            exchange.status_arrived(line[1])
        return line


class _Connection(HTTPConnection):
    response_class = _StatusFirst

    def _new_conn(self) -> socket.socket:
        try:
            return _current.get().connect(self._dns_host, self.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA refuses
            raise NewConnectionError(self, "no connection") from error

    def _tunnel(self) -> None:
        _current.get().stage = "tunnel"
        super()._tunnel()

    def connect(self) -> None:
        super().connect()
        _current.get().stage = "connect"  # behind a tunnel it is the provider's turn again


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


POOLS = {"http": _Pool, "https": _TLSPool}
