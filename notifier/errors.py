"""The errors: what a caller is told, and what a failed attempt means for the next."""

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


class TransportError(Exception):
    """An HTTP exchange ended before its status line.

    `kind` is one of `dns` `connect` `tls` `timeout` `reset` `protocol` `url`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(kind)


class AttemptFailed(Exception):
    """One provider did not accept the message; `reason` says why in one word or status.

    `outcome` is one of

    - `not_sent`: the provider does not have the message
    - `unknown`: it may have it
    - `rejected`: it has read the message and does not want it
    - `skipped`: it was not asked
    - `cut_short`: the request's deadline passed; no further provider may be tried
    """

    def __init__(self, outcome: str, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason
        super().__init__(f"{outcome}: {reason}")

    @property
    def status(self) -> int | None:
        """The status that the provider answered with, None if there was none."""
        return int(self.reason) if self.reason.isdigit() else None
