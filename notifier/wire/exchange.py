"""One HTTP exchange over a connection: a request goes out, the status of its answer comes back.

The status line decides. What follows is read for the caller, where it asks for a body, or else so
that the connection can be reused; at most 64 KiB of a body, for at most a second.
"""

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


class _Incomplete(Exception):
    """The peer ended the connection before its status line was complete."""


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
        except (OSError, Overlong, _Incomplete, *_PARSER_ERRORS) as error:
            raise TransportError(Fault.PROTOCOL) from error
        finally:
            if not self.reusable:
                self.close()

    def _exchange(self, budget: Budget, request: bytes, wanted: Wanted) -> Answer:
        budget.begin_phase()
        with suppress(BrokenPipeError, ConnectionResetError):  # its answer may be here
            self._stream.send(budget, request)
        reader = _ThoroughReader(self._stream, wanted) if any(wanted) else _Reader(self._stream)
        status = reader.status(budget)
        reader.drain(budget)
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
    """Reads one answer for its status; the `on_…` methods are what the parser calls."""

    def __init__(self, stream: Stream) -> None:
        self.headers: dict[str, str] = {}
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(
            lenient_version=True, lenient_optional_cr_before_lf=True
        )
        self._received = self._unparsed = b""
        self._body_bytes = 0
        self._is_whole = self._keeps_alive = False

    def status(self, budget: Budget) -> int:
        """Return the status once its line is complete; step over interim answers.

        The parser gets one line at a time, so a line that it refuses comes no later than the status
        line.
        """
        while True:
            self._parser.feed_data(self._line(budget))
            status = self._parser.get_status_code()
            if status >= HTTPStatus.OK:
                return status

    def drain(self, budget: Budget) -> None:
        """Read the rest, unless it is too long or takes too long."""
        budget.deadline = min(budget.deadline, time.monotonic() + DRAIN_SECONDS)
        budget.extend(DRAIN_BYTES)
        with suppress(OSError, Overlong, *_PARSER_ERRORS):
            self._parser.feed_data(self._unparsed)
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
        if self._parser.get_status_code() >= HTTPStatus.OK:
            self._keeps_alive = not self._is_whole and self._parser.should_keep_alive()
            self._is_whole = True

    def _line(self, budget: Budget) -> bytes:
        while b"\n" not in self._unparsed:
            data = self._stream.receive(budget)
            if not data:
                raise _Incomplete if self._received else _Disconnected
            self._received = data
            self._unparsed += data
        line, end, self._unparsed = self._unparsed.partition(b"\n")
        return line + end


class _ThoroughReader(_Reader):
    """Keeps what is wanted of header fields and body, too."""

    def __init__(self, stream: Stream, wanted: Wanted) -> None:
        super().__init__(stream)
        self._wanted = wanted
        self._body: list[bytes] = []
        self._has_head = self._says_length = False

    def body(self) -> bytes | None:
        return b"".join(self._body) if self._wanted.body and self._is_whole else None

    def on_end(self) -> None:
        self._is_whole = self._has_head and not self._says_length

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_head = self._says_length = False

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._says_length |= name in (b"content-length", b"transfer-encoding")
        if name in self._wanted.headers:
            self.headers[name.decode("latin-1")] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        super().on_body(data)
        self._body.append(data)
