"""One HTTP exchange over a connection: a request goes out, the status of its answer comes back.

The status line decides. What follows is read for the caller, where it asks for a body, or else so
that the connection can be reused; at most 64 KiB of a body, for at most a second.
"""

import re
import ssl
import time
from collections.abc import Collection
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

import httptools

from notifier.errors import Fault, TransportError
from notifier.wire.streams import Budget, Overlong, Plain, Stream

# What may be spent on an answer once its status is known.
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 64 * 1024

# A firewall on the way may have forgotten a connection that was idle for longer.
IDLE_SECONDS = 30.0

# How long to wait for the peer's RST.
RESET_SECONDS = 0.25

# What the parser raises; for a 101 it is the second, which is no HttpParserError.
_PARSER_ERRORS = (httptools.HttpParserError, httptools.HttpParserUpgrade)


class Wanted(NamedTuple):
    """What a caller needs of an answer besides its status.

    Args:
        headers: names of header fields, in lower case; not `location`, as no redirect is followed.
        body: whether to return the body.
    """

    headers: Collection[bytes] = ()
    body: bool = False


class Answer(NamedTuple):
    """An answer, its header fields by name in lower case, as far as they were wanted.

    `body` is None if it was not wanted, is longer than 64 KiB or did not come whole in time.
    """

    status: int
    headers: dict[str, str]
    body: bytes | None


STATUS_ONLY = Wanted()


class _Disconnected(Exception):
    """The peer ended the connection without an answer."""


class Malformed(Exception):
    """What the peer sends is no answer."""


class Head:
    """Reads the head of an answer, line by line; `rest` is what came after the last line read."""

    def __init__(self, stream: Stream) -> None:
        self.rest = b""
        self._stream = stream
        self._has_begun = False

    def status_line(self, budget: Budget) -> tuple[int, bool]:
        """Return the status once its line is complete, and whether it is one of HTTP/1.1.

        Interim answers are passed over (RFC 9110, section 15.2). A line is read as leniently as
        Python's http.client does: what a provider accepted must not go to the next one.

        Raises:
            Malformed: it is no status line.
        """
        while True:
            version, status = _parsed(self._line(budget))
            if status >= HTTPStatus.OK:
                return status, version == b"HTTP/1.1"
            if status == HTTPStatus.SWITCHING_PROTOCOLS:
                raise Malformed  # nobody asked for another protocol
            self.pass_fields(budget)

    def pass_fields(self, budget: Budget) -> None:
        """Read up to the empty line that ends the head."""
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
    """Return version and status of a status line."""
    version, status, *_ = [*line.split(None, 2), b"", b""]
    if not version.startswith(b"HTTP/") or not re.fullmatch(rb"[1-9][0-9][0-9]", status):
        raise Malformed
    return version, int(status)


class Connection:
    """A connection to a provider or proxy, kept between exchanges. Used by one thread at a time.

    Args:
        stream: carries the exchanges.
        plain: the connection itself, which `stream` may run TLS over.
    """

    def __init__(self, stream: Stream, plain: Plain) -> None:
        self.reusable = False
        self._stream, self._plain = stream, plain
        self._acknowledged: int | None = None  # before this request; None for a new connection
        self._idle_since = 0.0

    def is_fresh(self, now: float) -> bool:
        """Return True if the connection has not been idle for too long."""
        return now < self._idle_since + IDLE_SECONDS

    def is_quiet(self) -> bool:
        """Return True if the peer has neither closed it nor sent anything while it was idle."""
        is_quiet, self._acknowledged = self._plain.look()
        return is_quiet

    def close(self) -> None:
        self._stream.close()

    def post(self, budget: Budget, request: bytes, wanted: Wanted = STATUS_ONLY) -> Answer | None:
        """Return the answer; None if the peer closed the connection before the request arrived.

        Afterwards the connection is `reusable` or closed.

        Raises:
            TransportError: there was no status line.
        """
        self.reusable = False
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
        except (OSError, Overlong, Malformed) as error:
            raise TransportError(Fault.PROTOCOL) from error
        finally:
            if not self.reusable:
                self.close()

    def _exchange(self, budget: Budget, request: bytes, wanted: Wanted) -> Answer:
        budget.begin_phase()
        with suppress(BrokenPipeError, ConnectionResetError):  # its answer may be here
            self._stream.send(budget, request)
        head = Head(self._stream)
        status, is_current = head.status_line(budget)
        reader = _ThoroughReader(self._stream, wanted) if any(wanted) else _Reader(self._stream)
        # The parser gets the status line in a form that it does not refuse.
        line = f"HTTP/1.{1 if is_current else 0} {status} \r\n".encode()
        reader.drain(budget, line + head.rest)
        self.reusable = reader.ended_cleanly()
        self._idle_since = time.monotonic()
        return Answer(status, reader.headers, reader.body())

    def _never_arrived(self, budget: Budget) -> bool:
        """Return True if the peer had closed the connection before the request arrived.

        The peer ended its side, and refused the request by an RST without having acknowledged any
        of it: it may be sent again (RFC 9110, section 9.2.2). Without the RST the peer may only
        have ended its own side; an RST alone may come from a peer that has read all of it.
        """
        if self._acknowledged is None:
            return False
        seconds = min(RESET_SECONDS, max(0.0, budget.deadline - time.monotonic()))
        is_reset = self._plain.is_reset(seconds)
        return is_reset and self._plain.look().acknowledged == self._acknowledged


class _Reader:
    """Reads what follows a status; the `on_…` methods are what the parser calls."""

    def __init__(self, stream: Stream) -> None:
        self.headers: dict[str, str] = {}
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True)
        self._body_bytes = 0
        self._is_whole = self._keeps_alive = False

    def drain(self, budget: Budget, come: bytes) -> None:
        """Read the rest of an answer, unless it is too long or takes too long.

        Args:
            come: what has come of it, from the status line on.
        """
        budget.deadline = min(budget.deadline, time.monotonic() + DRAIN_SECONDS)
        budget.extend(DRAIN_BYTES)
        with suppress(OSError, Overlong, *_PARSER_ERRORS):
            self._parser.feed_data(come)
            while not self._is_whole:
                data = self._stream.receive(budget)
                if not data:
                    self.on_end()
                    break
                self._parser.feed_data(data)

    def ended_cleanly(self) -> bool:
        """Return True if the answer is whole and the connection can be reused."""
        return self._is_whole and self._keeps_alive and not self._stream.has_unread()

    def body(self) -> bytes | None:
        return None

    def on_end(self) -> None:
        """Note that the peer ended its side within the answer."""

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > DRAIN_BYTES:
            raise Overlong

    def on_message_begin(self) -> None:
        self._keeps_alive = False  # what follows a whole answer was not asked for

    def on_message_complete(self) -> None:
        self._keeps_alive = not self._is_whole and self._parser.should_keep_alive()
        self._is_whole = True


class _ThoroughReader(_Reader):
    """Keeps what is wanted of fields and body, too; nothing of trailers and later answers."""

    def __init__(self, stream: Stream, wanted: Wanted) -> None:
        super().__init__(stream)
        self._wanted = wanted
        self._body: list[bytes] = []
        self._has_head = self._says_length = False

    def body(self) -> bytes | None:
        return b"".join(self._body) if self._wanted.body and self._is_whole else None

    def on_end(self) -> None:
        self._is_whole = self._has_head and not self._says_length

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return
        name, text = name.lower(), value.decode("latin-1")
        self._says_length |= name in (b"content-length", b"transfer-encoding")
        if name in self._wanted.headers:
            key = name.decode("latin-1")
            # A field that comes twice is a list (RFC 9110, section 5.3).
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_body(self, data: bytes) -> None:
        super().on_body(data)
        if not self._is_whole:
            self._body.append(data)
