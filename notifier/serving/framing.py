"""Finds the end of a request's body in the bytes that have arrived, without waiting for more."""

import re
from enum import Enum
from typing import Any, Protocol

from gunicorn.http.body import LengthReader

from notifier.settings import MAX_BODY_BYTES

# Maximum bytes of a chunked body with its chunk sizes: single bytes in chunks take six times more.
MAX_CHUNKED_BYTES = 4 * MAX_BODY_BYTES

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;|$)")


class Body(Enum):
    """How much of a body has arrived."""

    PART = "part"
    WHOLE = "whole"
    # The rest need not arrive: the application refuses the body.
    UNUSABLE = "too long or malformed"


class Framing(Protocol):
    """The framing of one body."""

    def body(self, received: bytes) -> Body:
        """Return how much of the body has arrived.

        Args:
            received: all bytes after the head.
        """


def framing_of(request: Any) -> Framing:
    """Return the framing of the body of a request that gunicorn has parsed."""
    reader = request.body.reader
    return _Length(reader.length) if isinstance(reader, LengthReader) else _Chunks()


class _Length:
    """A body of a known length, possibly 0."""

    def __init__(self, length: int) -> None:
        self._length = length

    def body(self, received: bytes) -> Body:
        if self._length > MAX_BODY_BYTES:
            return Body.UNUSABLE
        return Body.WHOLE if len(received) >= self._length else Body.PART


class _Chunks:
    """A chunked body (RFC 9112, section 7.1). gunicorn checks it later; this only finds its end."""

    def __init__(self) -> None:
        self._next = 0  # where the next chunk begins, or the end of the last chunk's size
        self._size = 0  # of all chunks before it
        self._is_last = False

    def body(self, received: bytes) -> Body:
        while not self._is_last and (end := received.find(b"\r\n", self._next)) >= 0:
            match = _CHUNK_SIZE.match(received, self._next, end)
            if not match:
                return Body.UNUSABLE
            size = int(match[1], 16)
            self._size += size
            self._is_last = size == 0
            self._next = end if self._is_last else end + 2 + size + 2
        if self._is_last and received.find(b"\r\n\r\n", self._next) >= 0:  # after the trailers
            return Body.WHOLE
        arrived = self._size - max(0, self._next - 2 - len(received))
        is_too_long = arrived > MAX_BODY_BYTES or len(received) > MAX_CHUNKED_BYTES
        return Body.UNUSABLE if is_too_long else Body.PART
