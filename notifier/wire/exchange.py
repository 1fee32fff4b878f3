"""One HTTP exchange over a connection: send a request, read the status of its answer.

The status line decides the outcome. The rest of the answer is read to return its body, or else to
reuse the connection: at most 64 KiB of body, within one second.
"""

import re
import ssl
import time
from collections.abc import Collection
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

import httptools

from notifier.errors import Fault, TransportError, is_shortage
from notifier.wire.streams import Budget, Overlong, Plain, Stream

# Limits on reading the rest of an answer once its status is known.
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 64 * 1024

# Maximum idle time of a kept connection: a firewall may drop one that is idle for longer.
IDLE_SECONDS = 30.0

# How long to wait for the peer's RST.
RESET_SECONDS = 0.25

# The parser's errors. A 101 raises HttpParserUpgrade, which is not an HttpParserError.
_PARSER_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade)


class Wanted(NamedTuple):
    """The parts of an answer that a caller needs besides its status.

    Args:
        headers: names of header fields, in lower case. `location` is never returned, because
            redirects are not followed.
        body: whether to return the body.
    """

    headers: Collection[bytes] = ()
    body: bool = False


class Answer(NamedTuple):
    """The status of an answer, and the wanted header fields by lower-case name.

    `body` is None if it was not wanted, is longer than 64 KiB or did not arrive whole in time.
    """

    status: int
    headers: dict[str, str]
    body: bytes | None


STATUS_ONLY = Wanted()


class _Disconnected(ConnectionError):
    """The peer closed the connection before the first byte of an answer."""


class Malformed(Exception):
    """The peer sent a malformed answer."""


class Head:
    """Reads the head of an answer line by line; `rest` holds the bytes after the last line read."""

    def __init__(self, stream: Stream) -> None:
        self.rest = b""
        self._stream = stream
        self._has_begun = False

    def status_line(self, budget: Budget) -> tuple[int, bool]:
        """Return the final status, and True if the answer is HTTP/1.1.

        Interim answers are skipped (RFC 9110, section 15.2). The line is parsed as leniently as in
        Python's http.client: a message that a provider accepted must not go to the next provider.

        Raises:
            Malformed: the status line is malformed, or announces another protocol.
        """
        while True:
            version, status = _parsed(self._line(budget))
            if status >= HTTPStatus.OK:
                return status, version == b"HTTP/1.1"
            if status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise Malformed  # no request asks for another protocol
            self.pass_fields(budget)

    def pass_fields(self, budget: Budget) -> None:
        """Skip the header fields, up to the empty line that ends the head."""
        while self._line(budget).strip():
            pass

    def _line(self, budget: Budget) -> bytes:
        while b"\n" not in self.rest:
            data = self._stream.receive(budget)
            if not data:
                return self._last_line()
            self._has_begun = True
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _last_line(self) -> bytes:
        if not self.rest:
            raise Malformed if self._has_begun else _Disconnected
        line, self.rest = self.rest, b""
        return line


def _parsed(line: bytes) -> tuple[bytes, int]:
    """Return the version and the status of a status line."""
    version, status, *_ = [*line.split(None, 2), b"", b""]
    if not version.startswith(b"HTTP/") or not re.fullmatch(rb"[1-9][0-9][0-9]", status):
        raise Malformed
    return version, int(status)


class Connection:
    """A connection to a provider or proxy, reused for many exchanges, by one thread at a time.

    Args:
        stream: carries the exchanges.
        plain: the TCP connection; `stream` is the same object, or TLS over it.
    """

    def __init__(self, stream: Stream, plain: Plain) -> None:
        self.reusable = False
        self._stream, self._plain = stream, plain
        self._acknowledged: int | None = None  # before this request; None if unknown or new
        self._idle_since = 0.0

    def is_fresh(self, now: float) -> bool:
        """Return True if the connection has not been idle for too long."""
        return now < self._idle_since + IDLE_SECONDS

    def is_quiet(self) -> bool:
        """Return True if the peer neither closed the connection nor sent data while it was idle."""
        is_quiet, self._acknowledged = self._plain.look()
        return is_quiet

    def close(self) -> None:
        self._stream.close()

    def post(self, budget: Budget, request: bytes, wanted: Wanted = STATUS_ONLY) -> Answer | None:
        """Return the answer; None if the peer closed the connection before the request arrived.

        Afterwards the connection is `reusable` or closed.

        Raises:
            TransportError: no status line was received.
        """
        self.reusable = self._plain.has_sent = False
        try:
            return self._exchange(budget, request, wanted)
        except (_Disconnected, ssl.SSLEOFError) as error:
            if self._never_arrived(budget):
                return None
            raise TransportError(Fault.RESET) from error
        except TimeoutError as error:
            raise TransportError(Fault.TIMEOUT) from error
        except ConnectionError as error:
            raise TransportError(Fault.RESET) from error
        except (OSError, MemoryError, Overlong, Malformed) as error:
            unsent = is_shortage(error) and not self._plain.has_sent
            raise TransportError(Fault.SHORTAGE if unsent else Fault.PROTOCOL) from error
        finally:
            if not self.reusable:
                self.close()

    def _exchange(self, budget: Budget, request: bytes, wanted: Wanted) -> Answer:
        budget.begin_phase()
        with suppress(BrokenPipeError, ConnectionResetError):  # the peer may have answered already
            self._stream.send(budget, request)
        head = Head(self._stream)
        status, is_current = head.status_line(budget)
        reader = _CollectingReader(self._stream, wanted) if any(wanted) else _Reader(self._stream)
        # The parser is stricter than `Head`, so it gets a normalised status line.
        line = f"HTTP/1.{1 if is_current else 0} {status} \r\n".encode()
        reader.drain(budget, line + head.rest)
        self.reusable = reader.ended_cleanly()
        self._idle_since = time.monotonic()
        return Answer(status, reader.headers, reader.body())

    def _never_arrived(self, budget: Budget) -> bool:
        """Return True if the peer had closed the connection before the request arrived.

        The request may be resent (RFC 9110, section 9.2.2) if the peer sent a FIN, then an RST, and
        acknowledged no byte of the request. After a FIN alone the peer may still read.
        An RST alone may come from a peer that has read the whole request.
        """
        if self._acknowledged is None:
            return False
        seconds = min(RESET_SECONDS, max(0.0, budget.deadline - time.monotonic()))
        is_reset = self._plain.is_reset(seconds)
        return is_reset and self._plain.look().acknowledged == self._acknowledged


class _Reader:
    """Reads the rest of an answer after its status line. The parser calls the `on_…` methods."""

    def __init__(self, stream: Stream) -> None:
        self.headers: dict[str, str] = {}
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True)
        self._body_bytes = 0
        self._is_complete = self._keeps_alive = False

    def drain(self, budget: Budget, received: bytes) -> None:
        """Read the rest of the answer; give up if it is too long or too slow.

        Args:
            received: the part of the answer that has arrived, from the status line on.
        """
        budget.deadline = min(budget.deadline, time.monotonic() + DRAIN_SECONDS)
        budget.extend(DRAIN_BYTES)
        with suppress(OSError, Overlong, *_PARSER_ERRORS):
            self._parser.feed_data(received)
            while not self._is_complete:
                data = self._stream.receive(budget)
                if not data:
                    self.on_end()
                    break
                self._parser.feed_data(data)

    def ended_cleanly(self) -> bool:
        """Return True if the answer is complete and the connection can be reused."""
        return self._is_complete and self._keeps_alive and not self._stream.has_unread()

    def body(self) -> bytes | None:
        return None

    def on_end(self) -> None:
        """Handle a peer that ends its side before the end of the answer."""

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > DRAIN_BYTES:
            raise Overlong

    def on_message_begin(self) -> None:
        self._keeps_alive = False  # a second answer has no request: do not reuse the connection

    def on_message_complete(self) -> None:
        self._keeps_alive = not self._is_complete and self._parser.should_keep_alive()
        self._is_complete = True


class _CollectingReader(_Reader):
    """Also keeps the wanted header fields and body, but no trailers and no second answer."""

    def __init__(self, stream: Stream, wanted: Wanted) -> None:
        super().__init__(stream)
        self._wanted = wanted
        self._body: list[bytes] = []
        self._has_head = self._has_length = False

    def body(self) -> bytes | None:
        return b"".join(self._body) if self._wanted.body and self._is_complete else None

    def on_end(self) -> None:
        self._is_complete = self._has_head and not self._has_length

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return
        name, text = name.lower(), value.decode("latin-1")
        self._has_length |= name in (b"content-length", b"transfer-encoding")
        if name in self._wanted.headers:
            key = name.decode("latin-1")
            # Repeated fields form one list (RFC 9110, section 5.3).
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_body(self, data: bytes) -> None:
        super().on_body(data)
        if not self._is_complete:
            self._body.append(data)
