"""How one message reaches one provider: one attempt, guarded by the breaker of its host."""

import json
import logging
import time
from http import HTTPStatus

from pybreaker import CircuitBreakerError

from notifier import logs, metrics
from notifier.breakers import Breakers, Call
from notifier.errors import AttemptFailed, TransportError
from notifier.models import Message, Provider
from notifier.wire.transport import Transport

# What an exchange without a status line means, by how far it came; anything else is unknown.
OUTCOMES = {"url": "skipped", "dns": "not_sent", "connect": "not_sent", "tls": "not_sent"}

SUCCESS = range(200, 300)
REJECTED = range(300, 500)

# The provider asks for patience: it has not taken the message, and is not well.
TRY_LATER = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)

# Whether an outcome counts against the host. A rejection speaks for it: it answered in time. The
# outcomes that are not here say nothing about it.
BREAKER_FAILURE = {"not_sent": True, "unknown": True, "rejected": False}

# A host that had this share of its time, and did not answer, can't blame the request's deadline:
# the third of three attempts has always a little less than the whole.
FULL_ATTEMPT = 0.9

# What json.dumps would make for each call.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

log = logging.getLogger(__name__)


class Attempts:
    """Sends messages to providers. One per worker; may be used from any thread.

    Args:
        timeout: seconds that one attempt may take.
    """

    def __init__(self, transport: Transport, breakers: Breakers, timeout: float) -> None:
        self._transport = transport
        self._breakers = breakers
        self._timeout = timeout
        self._refused = logs.Sparing()

    def close(self) -> None:
        """Close the connections to the providers."""
        self._transport.close()

    def send(self, provider: Provider, message: Message, deadline: float) -> None:
        """Make one attempt; return if the provider accepted the message.

        Args:
            deadline: of the whole request, on `time.monotonic()`.

        Raises:
            AttemptFailed: it did not, or was not asked; says what that means for the next.
        """
        try:
            self._guarded(provider, message, deadline)
        except AttemptFailed as failure:
            times = self._refused.times(provider.id) if failure.reason == "breaker" else 1
            if times:
                _log_failure(provider, failure, times)
            raise

    def send_unguarded(self, provider: Provider, message: Message) -> int:
        """Make one attempt whatever the host's breaker says; return the status that accepted.

        Raises:
            AttemptFailed: the provider did not accept the message.
        """
        if provider.host is None:
            raise AttemptFailed("skipped", "url")
        return self._attempt(provider, message, time.monotonic() + self._timeout)

    def _guarded(self, provider: Provider, message: Message, deadline: float) -> None:
        if provider.host is None:
            raise AttemptFailed("skipped", "url")
        try:
            with self._breakers.of(provider.host).calling() as call:
                log.debug("breaker admits", extra={"host": provider.host})
                self._recorded(call, provider, message, deadline)
        except CircuitBreakerError:
            raise AttemptFailed("skipped", "breaker") from None

    def _recorded(self, call: Call, provider: Provider, message: Message, deadline: float) -> None:
        try:
            self._attempt(provider, message, deadline)
        except AttemptFailed as failure:
            if failure.outcome in BREAKER_FAILURE:
                call.record(failed=BREAKER_FAILURE[failure.outcome])
            raise
        call.record(failed=False)

    def _attempt(self, provider: Provider, message: Message, deadline: float) -> int:
        """Return the status that accepted the message."""
        time_left = deadline - time.monotonic()
        ends = deadline - max(0.0, time_left - self._timeout)
        try:
            status = self._post(provider, message, ends)
        except TransportError as error:
            if time_left < FULL_ATTEMPT * self._timeout and time.monotonic() >= ends:
                raise AttemptFailed("cut_short", "deadline") from error
            raise AttemptFailed(OUTCOMES.get(error.kind, "unknown"), error.kind) from error
        _judge(status)
        return status

    def _post(self, provider: Provider, message: Message, ends: float) -> int:
        """Call the provider, and count the call."""
        began = time.monotonic()
        try:
            status = self._transport.post(provider.url, _body(provider, message), _headers(), ends)
        except TransportError as error:
            _count(provider, None, error.kind, began)
            raise
        _count(provider, status, "", began)
        return status


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


def _judge(status: int) -> None:
    if status in SUCCESS:
        return
    if status in REJECTED and status not in TRY_LATER:
        raise AttemptFailed("rejected", str(status))
    raise AttemptFailed("not_sent" if status in TRY_LATER else "unknown", str(status))


def _count(provider: Provider, status: int | None, error: str, began: float) -> None:
    if provider.host and error != "url":  # else nobody was called
        metrics.called(provider.host, status, error).record(time.monotonic() - began)


def _log_failure(provider: Provider, failure: AttemptFailed, times: int) -> None:
    log.log(
        logging.ERROR if failure.status is None else logging.WARNING,
        "attempt failed",
        extra={
            "channel": provider.channel,
            "provider": provider.name,
            "provider_id": provider.id,
            "host": provider.host,
            "outcome": failure.outcome,
            "reason": failure.reason,
            "times": times,
        },
    )
