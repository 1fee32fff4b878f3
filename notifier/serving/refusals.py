"""Requests that the application must not see: why they are refused, and with which status.

gunicorn's parser finds most of them. It does not check the Host field.
"""

import os
import re
from ipaddress import AddressValueError, IPv6Address
from typing import Any, NamedTuple

from gunicorn.http import RequestParser
from gunicorn.http.errors import (
    ConfigurationProblem,
    ExpectationFailed,
    ForbiddenProxyRequest,
    InvalidHeader,
    InvalidResponseHeader,
    InvalidResponseHeaderName,
    LimitRequestHeaders,
    LimitRequestLine,
    ParseException,
    UnsupportedTransferCoding,
)

# gunicorn's statuses for the errors of its parser; the others are 400.
_STATUSES: dict[type[Exception], int] = {
    ConfigurationProblem: 500,
    ExpectationFailed: 417,
    ForbiddenProxyRequest: 403,
    InvalidResponseHeader: 500,
    InvalidResponseHeaderName: 500,
    LimitRequestHeaders: 431,
    LimitRequestLine: 414,
    UnsupportedTransferCoding: 501,
}

# Host = uri-host [ ":" port ] (RFC 9110, section 7.2), in the grammar of RFC 3986, section 3.2.2.
_CHARACTERS = r"A-Za-z0-9\-._~!$&'()*+,;="
_HOST = re.compile(
    rf"(?:\[(?:(?P<ipv6>[0-9A-Fa-f:.]+)|[vV][0-9A-Fa-f]+\.[{_CHARACTERS}:]+)\]"
    rf"|(?:[{_CHARACTERS}]|%[0-9A-Fa-f]{{2}})*)(?::[0-9]*)?"
)

# The application gets this request instead of the refused one. No route accepts its method, so the
# error handler replies.
_PLACEHOLDER = "REFUSED %s/ HTTP/1.1\r\nConnection: close\r\n\r\n"


class Refusal(NamedTuple):
    """The status of a refused request, and the reason in the log."""

    status: int
    reason: str

    @classmethod
    def of(cls, error: Exception) -> "Refusal":
        """Return the refusal for an error of gunicorn's parser; 500 for any other error."""
        unforeseen = 400 if isinstance(error, ParseException) else 500
        return cls(_STATUSES.get(type(error), unforeseen), type(error).__name__)


def placeholder(cfg: Any, client: Any) -> Any:
    """Return a request to answer in place of a refused one; its reply closes the connection."""
    head = _PLACEHOLDER % os.environ.get("SCRIPT_NAME", "")  # gunicorn requires this prefix
    return next(RequestParser(cfg, iter([head.encode()]), client))


def check_host(request: Any) -> None:
    """Check that an HTTP/1.1 request has a well-formed Host field (RFC 9112, section 3.2).

    Raises:
        InvalidHeader: the field is missing or malformed.
    """
    for name, value in request.headers:
        if name == "HOST":
            if not _is_host(value):
                raise InvalidHeader("HOST", req=request)
            return
    if request.version >= (1, 1):
        raise InvalidHeader("HOST", req=request)


def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text)
    if match is None or match["ipv6"] is None:
        return match is not None
    try:
        IPv6Address(match["ipv6"])
    except AddressValueError:
        return False
    return True
