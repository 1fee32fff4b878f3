"""One caller's connection: a request is read within its time, a reply is sent in one piece.

A thread never waits here for a head, nor for a caller that lingers after the last reply. It waits
for a body, and for a caller to read a reply that does not fit the kernel's buffer.
"""

import io
import socket
import time
from typing import Any

from gunicorn.http import RequestParser
from gunicorn.http.errors import NoMoreData, ParseException
from gunicorn.http.unreader import Unreader

# Seconds for a request from its first byte to its last, however it drips, and for a reply.
REQUEST_SECONDS = 5.0

# Seconds to wait for the rest of a body after an early reply, such as a refusal, so that the
# connection can be reused. No wait while another request needs the thread.
UNREAD_BODY_SECONDS = 0.2
UNREAD_BODY_BYTES = 64 * 1024

# A longer head goes to the parser unfinished, which refuses it.
HEAD_BYTES = 64 * 1024

_READ_BYTES = 8 * 1024
_MAX_READ_BYTES = 256 * 1024


class Caller(Unreader):
    """What gunicorn's parser reads from and its response writes to.

    One thread at a time uses a connection. Its socket never blocks. `buf` holds what has come and
    the parser has not read.

    Args:
        cfg: gunicorn's configuration.
        sock: what `accept` returned.
        client: the address of the peer.
        server: our own address.
    """

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__()
        sock.setblocking(False)
        self.socket = sock
        self.fd = sock.fileno()
        self.client = client
        self.server = server
        self.parser = RequestParser(cfg, (), client)
        self.parser.unreader = self  # type: ignore[assignment]  # it needs no socket
        self.leaving = False
        self.expires = 0.0  # when to close it unless something comes, on time.monotonic()
        self._due: float | None = None  # when the request that has begun must have come
        self._reply: list[bytes] = []

    # --- reading

    def has_head(self) -> bool:
        """Read without waiting; return True if the parser has enough.

        Raises:
            NoMoreData: the caller has left, or did not send the head in time.
        """
        if not self.has_read_head():
            data = self.buf.getvalue() + self._receive()
            self.buf = io.BytesIO(data)
        if self.has_read_head():
            return True
        if self._has_begun() and self._time_left() < 0:
            raise NoMoreData
        return False

    def has_read_head(self) -> bool:
        """Return True if what has been read is enough for the parser."""
        data = self.buf.getvalue()
        if b"\r\n\r\n" in data:
            return True
        if len(data) > HEAD_BYTES:
            self._ends_within(0)  # the parser does not wait for the end of the head
            return True
        return data.count(b"\n") != data.count(b"\r\n")  # the parser refuses bare line feeds

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return more of the request that the parser has begun to read, waiting for it if need be.

        Raises:
            NoMoreData: the time of the request is up.
        """
        size = min(max(size_hint or 0, _READ_BYTES), _MAX_READ_BYTES)
        try:
            return self.socket.recv(size)
        except BlockingIOError:
            pass
        self.socket.settimeout(max(0.0, self._time_left()))
        try:
            return self.socket.recv(size)
        except (TimeoutError, BlockingIOError):
            raise NoMoreData from None
        finally:
            self.socket.setblocking(False)

    def end_request(self, patience: float) -> bool:
        """Drop the rest of the body; return True if the caller can use the connection again.

        Args:
            patience: seconds to wait for the rest.

        Raises:
            NoMoreData: the rest has not come in time.
        """
        self._ends_within(patience)
        complete: bool = self.parser.finish_body(max_bytes=UNREAD_BODY_BYTES)
        self._due = None
        return complete

    def expire_after(self, idle_seconds: float) -> None:
        """Set `expires`: `idle_seconds` from now, or the end of the time of what has begun."""
        left = self._time_left() if self.leaving or self._has_begun() else idle_seconds
        self.expires = time.monotonic() + left

    def _has_begun(self) -> bool:
        return self.buf.getbuffer().nbytes > 0

    def _ends_within(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds

    def _time_left(self) -> float:
        now = time.monotonic()
        if self._due is None:
            self._due = now + REQUEST_SECONDS
        return self._due - now

    def _receive(self) -> bytes:
        try:
            data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise NoMoreData
        return data

    # --- writing

    def send(self, data: bytes) -> None:
        """Send an interim reply at once. gunicorn's name for it."""
        self.socket.send(data)

    def sendall(self, data: bytes) -> None:
        """Add to the reply. gunicorn's response writes the head and the body apart."""
        self._reply.append(data)

    def flush(self) -> None:
        """Send the reply.

        Raises:
            OSError: the caller has left, or does not take the reply.
        """
        data = b"".join(self._reply)
        self._reply.clear()
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.socket.settimeout(REQUEST_SECONDS)
            try:
                self.socket.sendall(memoryview(data)[sent:])
            finally:
                self.socket.setblocking(False)

    # --- closing

    def leave(self) -> None:
        """Send nothing more, and begin to wait for the caller to close.

        Closing at once would answer what the caller still sends with a reset, which can overtake
        the last reply (RFC 9112, section 9.6).
        """
        self.leaving = True
        self._reply.clear()
        self.take_buffered()
        self._ends_within(REQUEST_SECONDS)
        self.socket.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Drop what has come after the last reply.

        Raises:
            NoMoreData: the caller has closed, or had its time.
        """
        self._receive()
        if self._time_left() < 0:
            raise NoMoreData

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class BodyReader:
    """Reads a body, and raises `OSError` for malformed chunks as for a caller that has left.

    So the application needs no exception of gunicorn's: WSGI libraries expect that one.
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
