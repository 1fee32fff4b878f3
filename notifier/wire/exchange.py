"""How one HTTP exchange is held to its deadline, name look-up included.

requests and urllib3 bound single socket operations: a peer that sends a byte a second is never
late, each resolved address gets the full connect time-out, and a name look-up has no bound at all.
Here one deadline holds for the whole exchange: its sockets set what is left before each operation.
"""

import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import (
    BadStatusLine,
    HTTPException,
    HTTPResponse,
    LineTooLong,
    RemoteDisconnected,
)
from typing import IO, Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

# What may be spent on an answer once its status line is known. The rest of the answer changes
# nothing; it is read only so that the connection can be used again.
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 64 * 1024

# The most that is read of an answer, with all that comes before and between its parts. A reading
# counts as this at least: single bytes, come they ever so fast, would keep a worker busy.
ANSWER_BYTES = 2 * DRAIN_BYTES
READING_BYTES = 256

# What has lain idle for longer may have been forgotten on the way, by a firewall say.
IDLE_SECONDS = 30.0

# How long one waits to hear that a connection is gone for good.
RESET_SECONDS = 0.25

# Where tcpi_bytes_acked is in Linux's struct tcp_info.
BYTES_ACKED = slice(120, 128)

# The fields that say where an answer ends, and whether another may follow.
FRAMING = {"connection", "content-length", "transfer-encoding"}

BODILESS = (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)

Address = tuple[Any, Any, int, str, Any]  # as getaddrinfo returns them


@dataclass(slots=True, eq=False)
class Exchange:
    """What the sockets of one exchange share.

    Used by one thread; others only cut it off. `_guard` sees to it that what they cut is the socket
    of this exchange, and not yet another's.
    """

    deadline: float  # time.monotonic()
    resolve: Callable[[str, int, float], list[Address]]  # host, port, seconds it may take
    stage: str = "url"  # how far it came: then dns, connect, tunnel (a proxy's), tls, sent
    unread: bool = False  # whether the connection was closed before the request reached the peer
    _allowance: int = ANSWER_BYTES
    _sock: socket.socket | None = None
    _guard: threading.Lock = field(default_factory=threading.Lock)

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

    def received(self, count: int) -> None:
        """Note that so many bytes of an answer have come."""
        self._allowance -= max(count, READING_BYTES)
        if self._allowance < 0:
            raise LineTooLong("an answer")

    def uses(self, sock: socket.socket | None) -> None:
        """Note which socket is used, or that none is any more."""
        with self._guard:
            self._sock = sock

    def cut_off(self) -> None:
        """End whatever the socket is doing, from another thread."""
        with self._guard, suppress(OSError):
            if self._sock:
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def answered(self) -> None:
        """Note that the status has come: there is little time for the rest."""
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
        exchange = _current.get()
        self.settimeout(exchange.time_left())
        data = super().recv(*args)
        exchange.received(len(data))
        return data

    def recv_into(self, *args: Any) -> int:
        exchange = _current.get()
        self.settimeout(exchange.time_left())
        count = super().recv_into(*args)
        exchange.received(count)
        return count

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
        exchange.uses(self)
        self.settimeout(exchange.time_left())
        self.suppress_ragged_eofs = False  # a reset in between would look like an end
        super().do_handshake(block)

    def recv_into(self, *args: Any) -> int:
        """Tell a connection that has ended from one that was reset, which OpenSSL does not."""
        self.settimeout(_current.get().time_left())
        if not self.pending() and socket.socket.recv(self, 1, socket.MSG_PEEK) == b"":
            return 0
        try:
            return super().recv_into(*args)
        except ssl.SSLEOFError as error:
            _current.get().time_left()  # or it was cut off
            raise ConnectionResetError from error

    def send(self, *args: Any) -> int:
        try:
            return super().send(*args)
        except ssl.SSLEOFError as error:  # as a plain socket has it
            raise BrokenPipeError from error


class _Answer(HTTPResponse):
    """An answer, of which only the status counts.

    http.client would make an e-mail message of its fields, which takes longer than the rest of the
    exchange, and up to 6 MiB. Here they are read for what says where the body ends.
    """

    # What urllib3 asks an answer for.
    version_string = "HTTP/1.1"
    length_remaining = None
    headers: Any

    def begin(self) -> None:
        self.protocol, self.status, _ = self._read_status()
        self.headers = {}
        _current.get().answered()

    def drained(self) -> bool:
        """Read the rest, if it is not too long; say whether the next answer begins behind it."""
        fields = _read_fields(self.fp)
        bodiless = self.status in BODILESS
        self.chunked = fields.get("transfer-encoding", "").lower() == "chunked" and not bodiless
        self.chunk_left = None
        self.length = 0 if bodiless else _length(fields)
        if self.protocol != "HTTP/1.1" or "close" in fields.get("connection", "").lower():
            return False
        if not self.chunked and (self.length is None or self.length > DRAIN_BYTES):
            return False
        self.read(DRAIN_BYTES)
        return self.isclosed()

    def _read_status(self) -> tuple[str, int, str]:
        """Step over interim answers, as RFC 9110, section 15.2 has it; http.client knows one."""
        line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        while line[1] < HTTPStatus.OK:
            if line[1] == HTTPStatus.SWITCHING_PROTOCOLS:
                raise BadStatusLine("nobody asked for another protocol")
            _read_fields(self.fp)
            line = super()._read_status()  # type: ignore[misc]
        return line


def _read_fields(lines: IO[bytes]) -> dict[str, str]:
    """Return the fields that matter here, up to the empty line, by name in lower case."""
    fields: dict[str, list[str]] = {}
    while (line := lines.readline()) not in (b"\r\n", b"\n"):
        if not line.endswith(b"\n"):
            raise RemoteDisconnected("within the fields of an answer")
        name, _, value = line.decode("latin-1").partition(":")
        if (name := name.lower()) in FRAMING:
            fields.setdefault(name, []).append(value.strip())
    # Said twice, they are one list: RFC 9110, section 5.3.
    return {name: ", ".join(values) for name, values in fields.items()}


def _length(fields: Mapping[str, str]) -> int | None:
    """Return the length of the body, None if it is not said, or not clearly."""
    length = fields.get("content-length", "")
    if "transfer-encoding" in fields or not (length.isascii() and length.isdigit()):
        return None
    return int(length)


class _Connection(HTTPConnection):
    """urllib3's connection; writes a request at once, and reads an answer for its status."""

    response_class = _Answer
    _kept = False  # whether it has served a request before
    _idle_since = 0.0  # on time.monotonic()
    _acknowledged = None  # of what was sent before this request

    def _new_conn(self) -> socket.socket:
        try:
            return _current.get().connect(self._dns_host, self.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA refuses
            raise NewConnectionError(self, "no connection") from error

    def _tunnel(self) -> None:
        _current.get().stage = "tunnel"
        super()._tunnel()

    def request(  # type: ignore[override]
        self, method: str, url: str, body: bytes, headers: Mapping[str, str], **_: object
    ) -> None:
        sock = _beneath(self.sock)
        _current.get().uses(sock)
        self._acknowledged = _acknowledged(sock) if self._kept else None
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        self.send(f"{method} {url} HTTP/1.1\r\n{fields}\r\n".encode("latin-1") + body)

    @property
    def is_connected(self) -> bool:
        """Say whether a kept connection may be used again."""
        return super().is_connected and time.monotonic() < self._idle_since + IDLE_SECONDS

    def close(self) -> None:
        super().close()
        self._kept = False

    def getresponse(self) -> _Answer:  # type: ignore[override]
        answer = _Answer(self.sock, method="POST")
        usable = False
        try:
            answer.begin()
            with suppress(OSError, HTTPException, ValueError):  # the status has decided
                usable = answer.drained() and not _has_more(self.sock)
        except RemoteDisconnected:
            _current.get().unread = self._nothing_arrived()
            raise
        finally:
            _current.get().uses(None)
            answer.close()
            if not usable:
                self.close()
        self._kept, self._idle_since = usable, time.monotonic()
        return answer

    def _nothing_arrived(self) -> bool:
        """Say whether a kept connection had been closed before this request arrived there.

        The peer ended it, and then refused the request by a reset, without having acknowledged any
        of it: nobody has it, and it may be sent again (RFC 9110, section 9.2.2). Without the reset
        the peer may only have ended its own side, and with a reset alone it may have read all.
        """
        before = self._acknowledged
        if not before:  # not kept, or the system does not count
            return False
        sock, seconds = _beneath(self.sock), min(RESET_SECONDS, _current.get().time_left())
        hang_up = select.poll()
        hang_up.register(sock, 0)
        return bool(hang_up.poll(1000 * seconds)) and _acknowledged(sock) == before


def _has_more(sock: Any) -> bool:
    """Say whether TLS holds more than has been asked for: what looks at the socket can't see it."""
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


def _beneath(sock: Any) -> socket.socket:
    """Return the socket itself: for TLS in a proxy's TLS urllib3 has something around it."""
    beneath: socket.socket = getattr(sock, "socket", sock)
    return beneath


def _acknowledged(sock: socket.socket) -> int | None:
    """Return how many bytes the peer has acknowledged; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.stop)
    return int.from_bytes(info[BYTES_ACKED], sys.byteorder)


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection  # type: ignore[assignment]

    def urlopen(self, *args: Any, **kwargs: Any) -> Any:
        """Take the connection back with the answer: that has been read."""
        return super().urlopen(*args, **kwargs | {"release_conn": True})


class _TLSPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TLSConnection  # type: ignore[assignment]


POOLS = {"http": _Pool, "https": _TLSPool}
