"""One attempt to deliver one message through one provider, guarded by its endpoint's breaker."""

import json
import logging
import time
from http import HTTPStatus
from typing import Any

from pybreaker import CircuitBreakerError

from notifier import logs, metrics
from notifier.breakers import Breakers, Call
from notifier.errors import (
    DEADLINE,
    OPEN,
    AttemptFailed,
    AttemptOutcome,
    Fault,
    TransportError,
)
from notifier.models import Message, Provider
from notifier.wire.transport import Transport

# The outcome of an exchange without a status line.
_BY_FAULT = {
    Fault.URL: AttemptOutcome.SKIPPED,
    Fault.DNS: AttemptOutcome.NOT_SENT,
    Fault.CONNECT: AttemptOutcome.NOT_SENT,
    Fault.TLS: AttemptOutcome.NOT_SENT,
    Fault.PROXY: AttemptOutcome.NOT_SENT,
    Fault.SHORTAGE: AttemptOutcome.NOT_SENT,
    Fault.TIMEOUT: AttemptOutcome.UNKNOWN,
    Fault.RESET: AttemptOutcome.UNKNOWN,
    Fault.PROTOCOL: AttemptOutcome.UNKNOWN,
}

_SUCCESSES = range(200, 300)
_REFUSALS = range(300, 500)

# Statuses that ask to retry later: the provider has not taken the message.
_RETRY_LATER = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)

# An attempt that had at least this share of `timeout` was not cut short by the request's deadline:
# the last of three always has a little less than the whole.
FULL_ATTEMPT = 0.9

# json.dumps would make one for each call.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

log = logging.getLogger(__name__)


class Attempts:
    """Makes attempts at providers. One per worker; may be used from any thread.

    Args:
        timeout: seconds that one attempt may take.
    """

    def __init__(self, transport: Transport, breakers: Breakers, timeout: float) -> None:
        self._transport = transport
        self._breakers = breakers
        self._timeout = timeout
        self._skips = logs.OncePerSecond()

    def close(self) -> None:
        """Close the connections to the providers."""
        self._transport.close()

    def send(self, provider: Provider, message: Message, deadline: float) -> None:
        """Make one attempt; return if the provider accepted the message.

        Args:
            deadline: of the whole request, on `time.monotonic()`.

        Raises:
            AttemptFailed: the provider did not accept the message, or was not called.
        """
        try:
            self._guarded(provider, message, deadline)
        except CircuitBreakerError:
            failure = AttemptFailed(AttemptOutcome.SKIPPED, OPEN)
            self._log_skip(logging.WARNING, provider, failure)
            raise failure from None
        except AttemptFailed as failure:
            if failure.outcome is AttemptOutcome.SKIPPED:
                self._log_skip(logging.ERROR, provider, failure)
            else:
                level = logging.ERROR if failure.status is None else logging.WARNING
                log.log(level, "attempt failed", extra=_log_fields(provider, failure))
            raise

    def send_unguarded(self, provider: Provider, message: Message) -> int:
        """Make one attempt past the endpoint's breaker; return the status of the acceptance.

        Raises:
            AttemptFailed: the provider did not accept the message.
        """
        if provider.endpoint is None:
            raise AttemptFailed(AttemptOutcome.SKIPPED, Fault.URL)
        return self._attempt(provider, message, time.monotonic() + self._timeout)

    def _log_skip(self, level: int, provider: Provider, failure: AttemptFailed) -> None:
        if times := self._skips.times((provider.id, failure.reason)):
            log.log(level, "provider skipped", extra=_log_fields(provider, failure, times))

    def _guarded(self, provider: Provider, message: Message, deadline: float) -> None:
        if provider.endpoint is None:
            raise AttemptFailed(AttemptOutcome.SKIPPED, Fault.URL)
        with self._breakers.of(provider.endpoint).calling() as call:
            log.debug("breaker admits", extra={"host": provider.endpoint})
            self._recorded(call, provider, message, deadline)

    def _recorded(self, call: Call, provider: Provider, message: Message, deadline: float) -> None:
        try:
            self._attempt(provider, message, deadline)
        except AttemptFailed as failure:
            call.record(failed=failure.endpoint_failed)
            raise
        call.record(failed=AttemptOutcome.ACCEPTED.endpoint_failed)

    def _attempt(self, provider: Provider, message: Message, deadline: float) -> int:
        """Return the status of the acceptance."""
        began = time.monotonic()
        ends = min(deadline, began + self._timeout)
        try:
            status = self._post(provider, message, began, ends)
        except TransportError as error:
            is_short = ends - began < FULL_ATTEMPT * self._timeout
            if is_short and time.monotonic() >= ends:
                raise AttemptFailed(AttemptOutcome.UNKNOWN, DEADLINE) from error
            raise AttemptFailed(_BY_FAULT[error.fault], error.fault, error.detail) from error
        if status not in _SUCCESSES:
            raise AttemptFailed(_judge(status), str(status))
        return status

    def _post(self, provider: Provider, message: Message, began: float, ends: float) -> int:
        """Call the provider, and count the call."""
        try:
            answer = self._transport.post(provider.url, _body(provider, message), _headers(), ends)
        except TransportError as error:
            _count(provider, None, error.fault, began)
            raise
        _count(provider, answer.status, "", began)
        return answer.status


def _body(provider: Provider, message: Message) -> bytes:
    fields = {
        "to": message.to,
        "title": message.title,
        "message": message.message,
        "secret_key": provider.secret_key,
    }
    return _JSON.encode(fields).encode()


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    request_id = logs.request_id.get()
    if request_id:
        headers["X-Request-Id"] = request_id
    return headers


def _judge(status: int) -> AttemptOutcome:
    """Return the outcome of an attempt with a status that does not accept the message."""
    if status in _RETRY_LATER:
        return AttemptOutcome.NOT_SENT
    return AttemptOutcome.REJECTED if status in _REFUSALS else AttemptOutcome.UNKNOWN


def _count(provider: Provider, status: int | None, error: str, began: float) -> None:
    if provider.endpoint and error != Fault.URL:  # else there was no call
        seconds = time.monotonic() - began
        metrics.client_calls(provider.endpoint, status, error).record(seconds)


def _log_fields(provider: Provider, failure: AttemptFailed, times: int = 1) -> dict[str, Any]:
    return {
        "channel": provider.channel,
        "provider": provider.name,
        "provider_id": provider.id,
        "host": provider.endpoint,
        "outcome": failure.outcome,
        "reason": failure.reason,
        "detail": failure.detail,
        "times": times,
    }
