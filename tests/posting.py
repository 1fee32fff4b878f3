"""Posts through a Transport, with the bounds that every one of them has to keep."""

import time

import pytest

from notifier.errors import TransportError
from notifier.wire.transport import Transport
from tests.timing import within


def post(
    transport: Transport,
    url: str,
    body: bytes = b"{}",
    headers: dict[str, str] | None = None,
    *,
    seconds: float = 5.0,
) -> int:
    """Return the status of a post that may take `seconds`."""
    return transport.post(url, body, headers or {}, time.monotonic() + seconds).status


def failure(transport: Transport, url: str, body: bytes = b"{}", *, seconds: float = 0.4) -> str:
    """Return how a post failed; it has to, and soon after its deadline at the latest."""
    return failed(transport, url, body, seconds=seconds)[0]


def failed(
    transport: Transport, url: str, body: bytes = b"{}", *, seconds: float = 0.4
) -> tuple[str, str | None]:
    """Return how a post failed, as `failure` does, and the system's words for it."""
    with within(seconds + 2), pytest.raises(TransportError) as caught:
        post(transport, url, body, seconds=seconds)
    return caught.value.fault, caught.value.detail
