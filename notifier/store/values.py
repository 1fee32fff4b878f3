"""Validates the values that an operator gives a provider."""

import re
from collections.abc import Callable
from typing import Any, TypedDict

import requests
from urllib3.util import parse_url

from notifier.errors import Refused
from notifier.models import Channel, endpoint_of

MAX_NAME = 100
MAX_URL = 2048
MAX_SECRET = 16 * 1024
_INT32 = range(-(2**31), 2**31)

# The user info of a URL, with its @; the first group is the text before it.
USER_INFO = re.compile(r"^([^/?#]*//)?[^/?#]*@")


class Values(TypedDict, total=False):
    """The columns that an operator sets. A missing column keeps its value or gets its default."""

    provider_type: str
    provider_name: str
    host: str
    priority: int
    secret_key: str | None  # None removes the secret


def checked(values: Values) -> dict[str, Any]:
    """Return the values by column, after checking each of them.

    Raises:
        Refused: a value is invalid; the message quotes neither a URL nor a secret.
    """
    for column, value in values.items():
        _CHECKS[column](value)
    return dict(values)


def check_channel(channel: str) -> None:
    """Raise Refused for a channel that the service does not know."""
    if channel not in list(Channel):
        raise Refused(f"the channel is unknown: expected {' or '.join(Channel)}")


def _check_name(name: str) -> None:
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise Refused(f"the name cannot be used: expected 1 to {MAX_NAME} printable characters")


def check_url(url: str) -> None:
    """Raise Refused for a URL that cannot be called, without quoting it: it may hold a password."""
    if not url.isprintable() or re.search(r"[ \\#]", url):
        raise Refused(
            "the host cannot be used: expected a URL without spaces, control characters,"
            " backslashes or #"
        )
    if USER_INFO.match(url):
        raise Refused("the host cannot be used: expected a URL without user and password")
    if len(url) > MAX_URL or not _can_be_called(url):
        raise Refused(
            "the host cannot be used: expected an http or https URL with a host, such as"
            f" https://mail.example.com/v1/send, of up to {MAX_URL} characters"
        )


def _can_be_called(url: str) -> bool:
    """Return True if the service can call the URL; requests refuses some that urllib3 parses."""
    try:
        requests.Request("POST", url).prepare()
    except (requests.RequestException, ValueError):
        return False
    return endpoint_of(url) is not None


def _check_priority(priority: int) -> None:
    if priority not in _INT32:
        raise Refused(f"the priority cannot be used: expected {_INT32.start} to {_INT32.stop - 1}")


def _check_secret(secret: str | None) -> None:
    if secret is None:
        return
    if not secret.strip():
        raise Refused("the secret is empty")
    if len(secret) > MAX_SECRET or re.search("[\0\ud800-\udfff]", secret):
        raise Refused(f"the secret cannot be used: expected up to {MAX_SECRET} characters of text")


def same_place(url: str, other: str) -> bool:
    """Return True if both URLs are equivalent, even if they are written differently."""
    return _normal(url) == _normal(other)


def _normal(url: str) -> object:
    url = url.strip()
    endpoint = endpoint_of(url)
    if endpoint is None:
        return url
    parts = parse_url(url)
    return parts.scheme, endpoint, parts.path or "/", parts.query or ""


_CHECKS: dict[str, Callable[[Any], None]] = {
    "provider_type": check_channel,
    "provider_name": _check_name,
    "host": check_url,
    "priority": _check_priority,
    "secret_key": _check_secret,
}
