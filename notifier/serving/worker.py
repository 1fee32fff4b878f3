"""How a worker reads from its callers: gunicorn's gthread, with nobody waited for in its threads.

gthread reads a head in a thread, however long that takes. And in the one thread that all of its
connections depend on, it waits up to two seconds for a caller whom it has told "close" to do so.
Here both are left to the poller, which waits for all at once: a head that has not come whole, and
a caller that lingers, cost a connection and no thread. A body is read in a thread, within a time.
"""

import io
import socket
import time
from typing import Any

from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import _DEFER, ThreadWorker

# For a request from its first byte to its last, however it drips.
REQUEST_SECONDS = 5.0

# How often all connections are looked at for callers who have begun a request and fallen silent.
LOOK_SECONDS = 1.0

# Only Linux has it.
CORK = getattr(socket, "TCP_CORK", None)

# For a body that its request was answered without, by a refusal say, unless others wait for the
# thread. Who is sending it can go on using the connection; the others can read the answer.
UNREAD_BODY_SECONDS = 0.2

# A head that is longer is the parser's, which knows what is too long.
HEAD_BYTES = 64 * 1024


class Caller(SocketUnreader):
    """What one caller sends; `buf` keeps what the parser has not had."""

    _due: float | None = None  # of the request that has begun, on time.monotonic()
    leaving = False

    def next_request(self) -> None:
        """Begin to wait for another request, for as long as it likes."""
        self._due = None

    def ends_within(self, seconds: float) -> None:
        """Give the rest of this request no more than `seconds`."""
        self._due = time.monotonic() + seconds

    def has_head(self) -> bool:
        """Take what has come, without waiting, and say whether that is enough for the parser.

        Raises:
            NoMoreData: the caller has left, or had its time.
        """
        head = self.buf.getvalue()
        if not _is_enough(head):
            head += self._come()
            self.buf = io.BytesIO(head)
        if _is_enough(head):
            if len(head) > HEAD_BYTES:
                self.ends_within(0)
            return True
        if head and self._time_left() < 0:
            raise NoMoreData
        return False

    def leave(self) -> None:
        """Send nothing more, and wait for the caller's end: what it may still send would be
        answered with a reset, which can overtake our last reply (RFC 9112, section 9.6)."""
        self.leaving = True
        self.take_buffered()  # or a worker that stops would look there for another request
        self.ends_within(REQUEST_SECONDS)
        self.sock.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Forget what has come.

        Raises:
            NoMoreData: the caller has left too, or had its time.
        """
        self._come()
        if self._time_left() < 0:
            raise NoMoreData

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Read on in a request that the parser has begun; it has this thread until its time is up.

        Raises:
            NoMoreData: it is.
        """
        self.sock.settimeout(max(0.0, self._time_left()))
        try:
            data: bytes = super().chunk(size_hint)
        except (TimeoutError, BlockingIOError):
            raise NoMoreData from None
        return data

    def is_late(self) -> bool:
        """Say whether a request has begun, and had its time."""
        return self._due is not None and time.monotonic() > self._due

    def _come(self) -> bytes:
        self.sock.setblocking(False)
        try:
            data: bytes = self.sock.recv(self.mxchunk)
        except BlockingIOError:
            return b""
        if not data:
            raise NoMoreData
        return data

    def _time_left(self) -> float:
        now = time.monotonic()
        if self._due is None:
            self._due = now + REQUEST_SECONDS
        return self._due - now


def _is_enough(head: bytes) -> bool:
    """Say whether `head` is whole, or such that the parser refuses it without reading on."""
    if b"\r\n\r\n" in head or len(head) > HEAD_BYTES:
        return True
    return head.count(b"\n") != head.count(b"\r\n")


def _cork(sock: socket.socket, *, held: bool) -> None:
    """Hold back what does not fill a packet, or let it go."""
    if CORK is not None:
        sock.setsockopt(socket.IPPROTO_TCP, CORK, held)


class Worker(ThreadWorker):
    """gunicorn's gthread with the `Caller` of each connection in the place of its reader."""

    _next_look = 0.0  # at all connections, on time.monotonic()

    def handle(self, conn: Any) -> object:
        """Answer the request of `conn` if its head is there; say what to do with the connection."""
        if not conn.initialized:
            conn.init()
            conn.parser.unreader = Caller(conn.sock)
        caller: Caller = conn.parser.unreader
        if caller.leaving:
            caller.drop()
            return _DEFER
        # A worker that stops would not give half a head to the poller, but try again at once.
        if self.alive and not caller.has_head():
            return _DEFER
        if super().handle(conn):
            caller.next_request()
            return True
        caller.leave()
        return _DEFER

    def handle_request(self, req: Any, conn: Any) -> object:
        """Send head and body of a reply together, which gunicorn writes one by one, and wait for
        a caller to read them, but not for long."""
        conn.sock.settimeout(REQUEST_SECONDS)
        _cork(conn.sock, held=True)
        try:
            return super().handle_request(req, conn)
        except TimeoutError:
            raise NoMoreData from None
        finally:
            _cork(conn.sock, held=False)

    def murder_pending(self) -> None:
        """Now and then close connections whose time is up, though nothing more comes on them."""
        super().murder_pending()
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        for conn in [conn for conn in self.pending_conns if conn.parser.unreader.is_late()]:
            self.pending_conns.remove(conn)
            self.poller.unregister(conn.sock)  # type: ignore[union-attr]
            self.nr_conns -= 1
            conn.close()

    def _keepalive_after(self, conn: Any, keepalive: object) -> bool:
        others_wait = self.tpool._work_queue.qsize()  # type: ignore[union-attr]  # noqa: SLF001
        conn.parser.unreader.ends_within(0 if others_wait else UNREAD_BODY_SECONDS)
        return bool(super()._keepalive_after(conn, keepalive))

    def _cap_keepalive(self, deadline: float) -> None:
        """Cap the patience with connections on which nothing ever came, too.

        Load balancers open some in advance. The original waits its whole `graceful_timeout` for
        them, and a reload waits with it.
        """
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)
