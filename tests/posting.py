"""POST requests through a Transport, with checks that each one keeps its deadline."""

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
    """Post with a deadline of `seconds` and return the status."""
    return transport.post(url, body, headers or {}, time.monotonic() + seconds).status


def failure(transport: Transport, url: str, body: bytes = b"{}", *, seconds: float = 0.4) -> str:
    """Return the fault of a post that must fail, at the latest soon after its deadline."""
    return failed(transport, url, body, seconds=seconds)[0]


def failed(
    transport: Transport, url: str, body: bytes = b"{}", *, seconds: float = 0.4
) -> tuple[str, str | None]:
    """Return the fault, as `failure` does, and the system's words for it."""
    with within(seconds + 2), pytest.raises(TransportError) as caught:
        post(transport, url, body, seconds=seconds)
    return caught.value.fault, caught.value.detail
