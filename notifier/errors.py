"""The errors: what a caller is told, and what a failed attempt means for the next."""

from enum import StrEnum
from typing import ClassVar


class ApiError(Exception):
    """An error with a place in the HTTP contract.

    `message` is shown to the caller, so it never carries internals.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    headers: ClassVar[dict[str, str]] = {}
    message = ""

    def __init__(self, message: str | None = None) -> None:
        self.message = message if message is not None else self.message
        super().__init__(self.message)


class InvalidRequest(ApiError):
    """The request breaks the contract; the message names the field and what is wrong with it."""

    status = 422
    code = "E101"


class DeliveryFailed(ApiError):
    """At least one channel did not deliver. Why is the operators' business, not the caller's."""

    status = 500
    code = "E102"
    message = "internal server error"


class Overloaded(ApiError):
    """The worker has as many notifications as it can take. Nobody has been sent anything."""

    status = 503
    code = "E106"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}
    message = "too many requests, try again later"


class Refused(Exception):
    """What an operator asks for is not done; the message says why in one line."""


class PreferencesUnavailable(Exception):
    """PostgreSQL gave no providers in time, and none are known from before."""


class Fault(StrEnum):
    """How far an exchange came that ended without a status line."""

    URL = "url"  # no request can be made of the URL and the header fields
    DNS = "dns"
    CONNECT = "connect"  # a proxy's tunnel included
    TLS = "tls"
    # From here on the provider may have the request.
    TIMEOUT = "timeout"
    RESET = "reset"
    PROTOCOL = "protocol"


class TransportError(Exception):
    """An HTTP exchange ended before its status line; `fault` says how far it came."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault)


class AttemptOutcome(StrEnum):
    """How one attempt at a provider ended, and what follows from it.

    `endpoint_failed` is what the endpoint's breaker records: True a failure, False a success, None
    nothing. `ends_channel` says that no further provider may be tried.
    """

    endpoint_failed: bool | None
    ends_channel: bool

    def __new__(
        cls, value: str, endpoint_failed: bool | None, ends_channel: bool = False
    ) -> "AttemptOutcome":
        member = str.__new__(cls, value)
        member._value_ = value
        member.endpoint_failed, member.ends_channel = endpoint_failed, ends_channel
        return member

    ACCEPTED = "accepted", False, True
    NOT_SENT = "not_sent", True  # the provider does not have the message
    UNKNOWN = "unknown", True  # it may have the message
    REJECTED = "rejected", False  # it has read the message and does not want it: it answered
    SKIPPED = "skipped", None  # it was not asked
    DEADLINE = "deadline", None, True  # the request's deadline cut the attempt short


class AttemptFailed(Exception):
    """One provider did not accept the message; `reason` says why in one word or status."""

    def __init__(self, outcome: AttemptOutcome, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason
        super().__init__(f"{outcome}: {reason}")

    @property
    def status(self) -> int | None:
        """The status that the provider answered with, None if there was none."""
        return int(self.reason) if self.reason.isdigit() else None
