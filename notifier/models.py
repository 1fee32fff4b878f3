"""The values that pass through the service. All of them are frozen."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

DEFAULT_PORTS = {"http": 80, "https": 443}

# The columns that make a provider, in the order of `Provider.from_row`.
COLUMNS = ("id", "provider_type", "provider_name", "host", "secret_key")


class Channel(StrEnum):
    """A way to reach a recipient; the value is PostgreSQL's `notification_provider_type`."""

    EMAIL = "Email"
    PUSH = "PushNotification"


class Recipient(StrEnum):
    """A kind of recipient; the value is the path segment of the API."""

    BUYER = "buyer"
    SELLER = "seller"


class ChannelOutcome(StrEnum):
    """The outcome of a notification on one channel, or on all of them: the worst decides."""

    severity: int

    def __new__(cls, value: str, severity: int) -> "ChannelOutcome":
        member = str.__new__(cls, value)
        member._value_, member.severity = value, severity
        return member

    DELIVERED = "delivered", 0
    FAILED = "failed", 1
    NO_PROVIDER = "no_provider", 2

    @classmethod
    def worst(cls, outcomes: Iterable["ChannelOutcome"]) -> "ChannelOutcome":
        """Return the outcome of a notification from those of its channels."""
        return max(outcomes, key=lambda outcome: outcome.severity)


class Unusable(ValueError):
    """One column of a row makes the row unusable; `problem` never quotes the column's value."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"{column}: {problem}")
        self.column, self.problem = column, problem


@dataclass(frozen=True, slots=True)
class Message:
    """The recipient's email address, a title and a text, all hidden from `repr`."""

    to: str = field(repr=False)
    title: str = field(repr=False)
    message: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Provider:
    """A row of `notification_preferences`.

    `url` is the column `host`. `endpoint` (`mail.example.com:443`) is its name in logs, metrics and
    breakers, or None if the URL cannot be called.
    """

    id: int
    channel: Channel
    name: str
    url: str = field(repr=False)
    endpoint: str | None
    secret_key: str = field(repr=False)

    @classmethod
    def from_row(cls, row: tuple[int, str, str, str, str | None]) -> "Provider":
        """Make a provider of the values of `COLUMNS`.

        Raises:
            Unusable: a value is missing or of another type, or the channel is unknown.
        """
        for column, value in zip(COLUMNS, row, strict=True):
            _check(column, value)
        provider_id, channel, name, url, secret_key = row
        if channel not in _CHANNELS:
            raise Unusable("provider_type", "unknown channel")
        url = url.strip()
        return cls(provider_id, Channel(channel), name, url, endpoint_of(url), secret_key or "")

    def row(self) -> tuple[int, str, str, str, str]:
        """Return the values of which `from_row` makes an equal provider."""
        return self.id, self.channel, self.name, self.url, self.secret_key


_CHANNELS = frozenset(Channel)


def _check(column: str, value: object) -> None:
    if value is None:
        if column != "secret_key":
            raise Unusable(column, "missing")
    elif column == "id":
        if type(value) is not int:
            raise Unusable(column, "not an integer")
    elif not isinstance(value, str) or not _is_utf8(value):
        raise Unusable(column, "not UTF-8 text")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate, which stands for a byte that is no text
        return False
    return True


def endpoint_of(url: str) -> str | None:
    """Return `host:port` in lower case, always with a port; None if `url` cannot be called.

    It parses with urllib3, as requests does when it calls the URL.
    """
    try:
        parts = parse_url(url)
    except LocationParseError:
        return None
    port = parts.port if parts.port is not None else DEFAULT_PORTS.get(parts.scheme or "")
    if parts.scheme not in DEFAULT_PORTS or not parts.host or not port:
        return None
    return f"{parts.host.lower()}:{port}"
