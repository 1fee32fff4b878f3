"""One caller's connection: reads requests within a time limit, sends each reply in one piece.

No thread waits here for the head of a request, or for the caller to close after the last reply. A
thread does wait for a body, and to send a reply that is larger than the kernel's send buffer.
"""

import io
import socket
import time
from typing import Any

from gunicorn.http import RequestParser
from gunicorn.http.errors import NoMoreData, ParseException
from gunicorn.http.unreader import Unreader

# Maximum seconds to read a request from its first byte to its last, and to send a reply.
REQUEST_SECONDS = 5.0

# Maximum seconds and bytes to read of a body after an early reply, such as a refusal, so that the
# connection can be reused. Without an idle thread there is no wait.
UNREAD_BODY_SECONDS = 0.2
UNREAD_BODY_BYTES = 64 * 1024

# A longer head goes to the parser incomplete, and the parser refuses it.
HEAD_BYTES = 64 * 1024

_READ_BYTES = 8 * 1024
_MAX_READ_BYTES = 256 * 1024


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
        self.parser = RequestParser(cfg, (), client)
        self.parser.unreader = self  # type: ignore[assignment]  # replaces gunicorn's own
        self.leaving = False
        self.expires = 0.0  # when to close it if nothing arrives, on time.monotonic()
        self._due: float | None = None  # when the current read must be complete
        self._reply: list[bytes] = []

    # --- reading

    def has_head(self) -> bool:
        """Read without waiting; return True if the parser can now read a head, or refuse it.

        Raises:
            NoMoreData: the caller closed the connection, or the head is late.
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
        """Return True if the parser can read a head, or refuse it, from the bytes in `buf`."""
        data = self.buf.getvalue()
        if b"\r\n\r\n" in data:
            return True
        if len(data) > HEAD_BYTES:
            self._set_due(0)  # or the parser would wait for the end of the head
            return True
        return data.count(b"\n") != data.count(b"\r\n")  # the parser refuses bare line feeds

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return more bytes of the request that the parser is reading; wait for them if necessary.

        Raises:
            NoMoreData: nothing arrived in time.
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
        """Discard the rest of the body; return True if the connection can be reused.

        Args:
            patience: seconds to wait for the rest.

        Raises:
            NoMoreData: the rest did not arrive in time.
        """
        self._set_due(patience)
        complete: bool = self.parser.finish_body(max_bytes=UNREAD_BODY_BYTES)
        self._due = None
        return complete

    def expire_after(self, idle_seconds: float) -> None:
        """Set `expires` to when the current read is due, or `idle_seconds` from now without one."""
        left = self._time_left() if self.leaving or self._has_begun() else idle_seconds
        self.expires = time.monotonic() + left

    def _has_begun(self) -> bool:
        return self.buf.getbuffer().nbytes > 0

    def _set_due(self, seconds: float) -> None:
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
        """Send an interim reply at once, under the name that gunicorn calls."""
        self.socket.send(data)

    def sendall(self, data: bytes) -> None:
        """Add `data` to the reply: gunicorn's response writes its head and body separately."""
        self._reply.append(data)

    def flush(self) -> None:
        """Send the reply.

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
            self.socket.settimeout(REQUEST_SECONDS)
            try:
                self.socket.sendall(memoryview(data)[sent:])
            finally:
                self.socket.setblocking(False)

    # --- closing

    def leave(self) -> None:
        """Close the sending side, and start to wait for the caller to close its own.

        After a full close, the kernel would answer further bytes from the caller with a reset. The
        reset could erase the last reply before the caller reads it (RFC 9112, section 9.6).
        """
        self.leaving = True
        self._reply.clear()
        self.take_buffered()
        self._set_due(REQUEST_SECONDS)
        self.socket.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Discard bytes that arrived after the last reply.

        Raises:
            NoMoreData: the caller closed the connection, or its time is over.
        """
        self._receive()
        if self._time_left() < 0:
            raise NoMoreData

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


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
