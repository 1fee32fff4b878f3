"""One caller's connection: reads requests within a time limit, sends each reply in one piece.

No thread waits here for a request, or for the caller to close after the last reply. A thread does
wait to send a reply that is larger than the kernel's send buffer.
"""

import io
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gunicorn.http import RequestParser
from gunicorn.http.errors import LimitRequestHeaders, NoMoreData, ParseException
from gunicorn.http.unreader import Unreader

from notifier.arrival import Arrival
from notifier.serving.framing import Body, Framing, framing_of
from notifier.serving.refusals import check_host

# Maximum seconds from the connection to its first byte, from the first byte of a request to its
# last, and to send a reply.
REQUEST_SECONDS = 5.0

# Seconds after a reply in which the next request may be on its way.
IDLE_SECONDS = 0.1

# A longer head goes to the parser incomplete, and the parser refuses it.
HEAD_BYTES = 64 * 1024

_READ_BYTES = 64 * 1024
_PIECE_BYTES = 8 * 1024

# Empty lines before a request (RFC 9112, section 2.2), and half of one.
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_NOTHING = (b"", b"\r")

_INTERIM_REPLY = b"HTTP/1.1 100 Continue\r\n\r\n"


class Caller(Unreader):
    """A caller's connection. gunicorn's parser reads from it, and gunicorn's response writes to it.

    One thread at a time uses a connection. Between calls its socket is non-blocking. `buf` holds
    the bytes that were received and that the parser has not read.

    Args:
        cfg: gunicorn's configuration.
        sock: the accepted socket.
        client: the caller's address.
        server: our own address.
    """

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__()
        sock.setblocking(False)
        self.socket = sock
        self.fd = sock.fileno()
        self.client = client
        self.server = server
        self.leaving = False
        self.held = 0  # bytes of the request that have arrived
        self._ended = time.monotonic()  # when the last request ended, or the connection began
        self.expires = self._ended + REQUEST_SECONDS  # when to close it
        self._parser = RequestParser(cfg, (), client)
        self._parser.unreader = self  # type: ignore[assignment]  # replaces gunicorn's own
        self._keepalive: float = cfg.keepalive
        self._has_begun = False  # a request has begun to arrive
        self._has_served = False  # an earlier request has been answered
        self._has_ended = False  # the caller has closed its sending side, or its time is over
        self._request: Any = None  # parsed, while its body is incomplete
        self._framing: Framing | None = None
        self._body = Body.WHOLE
        self._unread = memoryview(b"")  # bytes that `receive` took from `buf` and `chunk` returns
        self._reply: list[bytes] = []

    # --- reading

    def receive(self) -> Any:
        """Read without waiting; return gunicorn's request once it has arrived, else None.

        A request has arrived with the last byte of its body. If its body stops early or is too
        long, it is returned with the part that there is, for the application to refuse it.

        Raises:
            ParseException: the head is malformed or too long.
            NoMoreData: the caller closed the connection between requests or within a head.
        """
        if not self.has_request():
            self._read()
        if self._request is None and self._has_head():
            self._parse()
        if self._request is None:
            if self._has_ended:
                raise NoMoreData
            return None
        if not self.has_request():
            return None
        request, self._request = self._request, None
        self._unread = memoryview(self.take_buffered())
        return request

    def is_whole(self) -> bool:
        """Return True if the last request that `receive` returned had arrived to its last byte."""
        return self._body is Body.WHOLE

    def has_request(self) -> bool:
        """Return True if `receive` can return a request, or refuse it, without reading."""
        if self._request is None:
            return self._has_head()
        return self._has_ended or self._has_body()

    def arrival(self) -> Arrival:
        """Return the arrival of the request: that of its last byte."""
        return Arrival.on(self.socket, self._ended if self._has_served else None)

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return more of the bytes that have arrived, for gunicorn's parser; it never waits.

        The parser copies the rest of a piece for each chunk in it, so pieces are small.
        """
        size = max(size_hint or 0, _PIECE_BYTES)
        piece, self._unread = self._unread[:size], self._unread[size:]
        return bytes(piece)

    def end_request(self) -> bool:
        """Discard the rest of the body; return True if the connection can be reused."""
        if not self._parser.finish_body() or self._has_ended:
            return False
        self._has_begun, self._has_served = False, True
        self.buf = io.BytesIO(self.take_buffered() + self._unread)
        self._unread = memoryview(b"")
        self.held = len(self.buf.getvalue())
        self._ended = time.monotonic()
        self.expires = self._ended + self._keepalive
        self._begin()
        return True

    def has_expired(self, now: float) -> bool:
        """Return True if its time is over, and not only because its request waits for a thread."""
        return self.expires < now and (self._has_begun or self.leaving or self.is_idle())

    def give_up(self) -> bool:
        """End the time of the request; return True if its head deserves a reply, the first time."""
        is_first, self._has_ended = not self._has_ended, True
        return is_first and self._request is not None

    def is_idle(self) -> bool:
        """Return True if no byte of the caller waits to be read, nor a request for a thread.

        A connection that was used just now is not idle: its next request may be on its way.
        """
        is_fresh = self._has_served and time.monotonic() < self._ended + IDLE_SECONDS
        if is_fresh or (not self.leaving and self.has_request()):
            return False
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)  # b"": it closed the connection
        except OSError:  # BlockingIOError is one
            return True

    def _read(self) -> None:
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        self._has_ended = not data
        self.held += len(data)
        self.buf.seek(0, io.SEEK_END)
        self.buf.write(data)
        if not self._has_begun:
            self._begin()

    def _begin(self) -> None:
        """Drop empty lines before a request, and start its time with its first byte."""
        data = self.buf.getvalue()
        if data.startswith(b"\r\n"):
            data = _EMPTY_LINES.sub(b"", data, 1)
            self.buf = io.BytesIO(data)
        if data not in _NOTHING:
            self._has_begun = True
            self.expires = time.monotonic() + REQUEST_SECONDS

    def _has_head(self) -> bool:
        """Return True if the parser can read a head, or refuse it."""
        data = self.buf.getvalue()
        if b"\r\n\r\n" in data or len(data) > HEAD_BYTES:
            return True
        return data.count(b"\n") != data.count(b"\r\n")  # the parser refuses bare line feeds

    def _has_body(self) -> bool:
        if self._framing:
            self._body = self._framing.body(self.buf.getvalue())
        return self._body is not Body.PART

    def _parse(self) -> None:
        """Parse a head, and send the interim reply if the caller waits for one."""
        try:
            request = next(self._parser)
        except NoMoreData:  # it is longer than `HEAD_BYTES`
            raise LimitRequestHeaders("the head is too long") from None
        check_host(request)
        self._request, self._framing = request, framing_of(request)
        if not self._has_body() and _expects_interim_reply(request):
            self.socket.send(_INTERIM_REPLY)

    # --- writing

    def send(self, data: bytes) -> None:
        """Drop `data`, gunicorn's interim reply: `receive` has sent it if the caller needs it."""

    def sendall(self, data: bytes) -> None:
        """Add `data` to the reply: gunicorn's response writes its head and body separately."""
        self._reply.append(data)

    def flush(self, waits: Callable[[], None]) -> None:
        """Send the reply.

        Args:
            waits: called before a wait for the caller.

        Raises:
            OSError: the caller closed the connection, or does not read the reply in time.
        """
        data = b"".join(self._reply)
        self._reply.clear()
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            waits()
            self.socket.settimeout(REQUEST_SECONDS)
            try:
                self.socket.sendall(memoryview(data)[sent:])
            finally:
                self.socket.setblocking(False)

    def discard(self) -> None:
        """Discard the reply, of which nothing has been sent."""
        self._reply.clear()

    # --- closing

    def leave(self) -> None:
        """Close the sending side, and start to wait for the caller to close its own.

        After a full close, the kernel would answer further bytes from the caller with a reset. The
        reset could erase the last reply before the caller reads it (RFC 9112, section 9.6).
        """
        self.leaving = True
        self.discard()
        self.take_buffered()
        self.expires = time.monotonic() + REQUEST_SECONDS
        self.socket.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Discard bytes that arrived after the last reply.

        Raises:
            NoMoreData: the caller closed the connection, or its time is over.
        """
        with suppress(BlockingIOError):
            if not self.socket.recv(_READ_BYTES):
                raise NoMoreData
        if time.monotonic() > self.expires:
            raise NoMoreData

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _expects_interim_reply(request: Any) -> bool:
    """Return True for `Expect: 100-continue` (RFC 9110, section 10.1.1)."""
    is_current = request.version >= (1, 1)
    return is_current and any(name == "EXPECT" for name, _ in request.headers)


class BodyReader:
    """Reads a body; malformed chunks raise `OSError`, as a closed connection does.

    WSGI libraries expect `OSError`, and the application need not know gunicorn's exceptions.
    """

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes.

        Raises:
            OSError: the body cannot be read.
        """
        try:
            data: bytes = self._reader.read(size)
        except ParseException:
            raise NoMoreData from None
        return data
