"""The errors: the replies that they become, and the outcomes of attempts at providers."""

import errno
import re
import socket
from enum import StrEnum
from typing import ClassVar

# Maximum length of `detail`, in characters.
MAX_DETAIL = 200

# The system's codes for a lack of descriptors, memory, ports, addresses and threads.
_SHORTAGES = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE),
        *(errno.ENOMEM, errno.ENOBUFS),
        errno.EADDRNOTAVAIL,
    }
)

# Parts of an OpenSSL message to remove: the error's name, and the C source line.
_OPENSSL_SOURCE = re.compile(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$")


class ApiError(Exception):
    """An error with a place in the HTTP contract.

    The caller sees `message`, so it never carries internals. The request's log line has `reason`.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    headers: ClassVar[dict[str, str]] = {}
    message = ""

    def __init__(self, message: str | None = None, *, reason: str | None = None) -> None:
        self.message = message if message is not None else self.message
        self.reason = reason or message
        super().__init__(self.message)


class InvalidRequest(ApiError):
    """The request breaks the contract; the message names the field and the problem."""

    status = 422
    code = "E101"


class DeliveryFailed(ApiError):
    """At least one channel did not deliver. Only the log tells why, and never the reply."""

    status = 500
    code = "E102"
    message = "internal server error"


class Overloaded(ApiError):
    """The worker has as many notifications as it can take. It has sent nothing."""

    status = 503
    code = "E106"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}
    message = "too many requests, try again later"


class Refused(Exception):
    """An operator's command is not carried out; the message gives the reason in one line."""


class PreferencesUnavailable(Exception):
    """The cache is empty, and PostgreSQL returned no providers in time."""


class Fault(StrEnum):
    """The step or the cause that ended an exchange without a status line."""

    URL = "url"  # no request can be made of the URL and the header fields
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    PROXY = "proxy"  # the proxy is unreachable, or opened no tunnel
    SHORTAGE = "shortage"  # this machine lacks descriptors, memory, ports or threads
    # From here on the provider may have the request.
    TIMEOUT = "timeout"
    RESET = "reset"
    PROTOCOL = "protocol"


class TransportError(Exception):
    """An HTTP exchange ended before its status line; `fault` names the step."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault)

    @property
    def detail(self) -> str | None:
        """The error text of the operating system or of OpenSSL; None without one.

        Never the text of an exception: a library's may quote a URL.
        """
        if not isinstance(self.__cause__, OSError):
            return None
        words = self.__cause__.strerror
        if words is None:
            return "timed out" if isinstance(self.__cause__, TimeoutError) else None
        words = _OPENSSL_SOURCE.sub("", words)[:MAX_DETAIL]
        return words[:1].lower() + words[1:]


def is_shortage(error: BaseException) -> bool:
    """Return True if this machine lacked a resource, so that no peer is to blame."""
    if isinstance(error, socket.gaierror):  # its numbers are not errno's
        return error.errno == socket.EAI_MEMORY
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError)


class AttemptOutcome(StrEnum):
    """How one attempt at a provider ended.

    `endpoint_failed` is what the endpoint's breaker records: True a failure, False a success, None
    nothing.
    """

    endpoint_failed: bool | None

    def __new__(cls, value: str, endpoint_failed: bool | None) -> "AttemptOutcome":
        member = str.__new__(cls, value)
        member._value_, member.endpoint_failed = value, endpoint_failed
        return member

    ACCEPTED = "accepted", False
    NOT_SENT = "not_sent", True  # the provider does not have the message
    UNKNOWN = "unknown", True  # it may have the message
    REJECTED = "rejected", False  # it answered that it does not take the message
    SKIPPED = "skipped", None  # it was not called


# The reasons of an attempt that ended with neither a status nor a `Fault`.
OPEN = "open"  # the endpoint's breaker did not admit it
DEADLINE = "deadline"  # the request's deadline cut it short, or was too near to begin it

# Reasons that say nothing about the endpoint.
_OURS = (DEADLINE, Fault.SHORTAGE)


class AttemptFailed(Exception):
    """A provider did not accept the message.

    `reason` is a status, a `Fault`, `OPEN` or `DEADLINE`. `detail` has the system's words for it.
    """

    def __init__(self, outcome: AttemptOutcome, reason: str, detail: str | None = None) -> None:
        self.outcome = outcome
        self.reason = reason
        self.detail = detail
        super().__init__(f"{outcome}: {reason}")

    @property
    def endpoint_failed(self) -> bool | None:
        """As `AttemptOutcome.endpoint_failed`; None if the cause lay with us, not the endpoint."""
        return None if self.reason in _OURS else self.outcome.endpoint_failed

    @property
    def status(self) -> int | None:
        """The status of the provider's answer; None without one."""
        return int(self.reason) if self.reason.isdigit() else None
