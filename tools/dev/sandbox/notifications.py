"""Joins the log lines, the form's requests and the providers' messages into notifications.

Each of them may come first, or never. The request id joins them. Where several notifications
share an id, the address, the providers and the time decide.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from notifier.logs import mask_address
from tools.dev.mock_provider import Message

# Seconds by which a line's computed start may be late: its timestamp is taken after its duration.
LATE = 1.0

_CHANNELS = {"PushNotification": "Push"}
_FAULTS = {
    "dns": "host not found",
    "connect": "no connection",
    "tls": "TLS failed",
    "proxy": "proxy failed",
    "shortage": "no free descriptor, port, thread or memory",
    "timeout": "no answer in time",
    "reset": "connection lost",
    "protocol": "malformed answer",
    "deadline": "cut short by the deadline",
}
_SKIPS = {"open": "breaker open", "deadline": "no time left", "url": "URL cannot be used"}


@dataclass(frozen=True, slots=True)
class Line:
    """A notification's `request` line in the service's log.

    `began` is a POSIX time. `to` is the masked address, None if the service did not read it.
    """

    request_id: str
    began: float
    recipient: str | None
    to: str | None
    status: int
    reason: str | None
    channels: Sequence[Mapping[str, Any]]

    @property
    def called(self) -> dict[str, str]:
        """The outcome of each provider that the service called."""
        tried = (each for channel in self.channels for each in channel.get("providers", ()))
        return {each["provider"]: each["outcome"] for each in tried if each["outcome"] != "skipped"}


@dataclass(frozen=True, slots=True)
class Sent:
    """A request of the page's form; `status` is None until the service has answered."""

    request_id: str
    began: float
    recipient: str
    to: str
    title: str
    message: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A message that a provider received."""

    provider: str
    message: Message

    @property
    def at(self) -> float:
        return datetime.fromisoformat(self.message.received_at).timestamp()

    @property
    def content(self) -> tuple[str, str, str]:
        return self.message.to, self.message.title, self.message.message


@dataclass(frozen=True, slots=True)
class Step:
    """The result at one provider; `tone` is good, bad, quiet or wait."""

    provider: str
    text: str
    tone: str


@dataclass(frozen=True, slots=True)
class Way:
    """The providers of one channel, in the order in which the service tried them."""

    channel: str
    steps: tuple[Step, ...]


@dataclass(slots=True)
class Notification:
    """One notification, as far as its sources are known."""

    request_id: str
    began: float
    line: Line | None = None
    sent: Sent | None = None
    seen: list[Seen] = field(default_factory=list)

    def takes(self, seen: Seen) -> bool:
        """Return whether a message can belong here: no provider gets a notification twice."""
        if self.line and self.line.to != mask_address(seen.message.to):
            return False
        return self.began < seen.at + LATE and all(
            other.provider != seen.provider and other.content == seen.content for other in self.seen
        )

    def preference(self, seen: Seen) -> tuple[bool, bool, float]:
        """Return a key that is lowest for the likeliest notification of a message.

        A line that did not call the provider is less likely. It is not ruled out: the service may
        know the provider by another name.
        """
        is_called = self.line is not None and seen.provider in self.line.called
        return not is_called, self.began > seen.at, abs(self.began - seen.at)

    def ways(self) -> list[Way]:
        """Return one way for each channel, from the log if it has them, else from the providers."""
        if self.line and all("providers" in channel for channel in self.line.channels):
            return [_logged_way(channel) for channel in self.line.channels]
        return _seen_ways(self.seen)

    def result(self) -> tuple[str, str]:
        """Return the result in words, and its tone."""
        status = self._status()
        if status is not None:
            return _result(status)
        last = {way.steps[-1].tone for way in self.ways()}
        if self.sent or "wait" in last:
            return "under way", "wait"
        return ("accepted", "good") if last == {"good"} else ("not accepted", "bad")

    def _status(self) -> int | None:
        known = self.line or self.sent
        return known.status if known else None

    def _may_have_arrived(self) -> bool:
        outcomes = self.line.called.values() if self.line else ()
        return any(each in ("accepted", "unknown") for each in outcomes)

    def shown(self, key: str) -> dict[str, Any]:
        """Return the page's fields; `key` identifies the notification while its sources arrive."""
        content = self.sent or (self.seen[0].message if self.seen else None)
        known = self.line or self.sent
        result, tone = self.result()
        return {
            "key": key,
            "request_id": self.request_id,
            "at": datetime.fromtimestamp(self.began, UTC).isoformat(timespec="milliseconds"),
            "recipient": known.recipient if known else None,
            "to": content.to if content else None,
            "title": content.title if content else None,
            "message": content.message if content else None,
            "result": result,
            "tone": tone,
            "status": self._status(),
            "reason": self.line.reason if self.line else None,
            "is_logged": self.line is not None,
            "may_have_arrived": self._may_have_arrived(),
            "ways": [asdict(way) for way in self.ways()],
            "received": [
                {
                    "provider": seen.provider,
                    "at": seen.message.received_at,
                    "secret_key": seen.message.secret_key,
                    "answer": seen.message.answer,
                }
                for seen in self.seen
            ],
        }


def parse_line(entry: Mapping[str, Any]) -> Line | None:
    """Return a notification's `request` line; None for any other line of the log."""
    if entry.get("message") != "request" or not str(entry.get("route")).endswith("/notify"):
        return None
    ended = datetime.fromisoformat(entry["timestamp"]).timestamp()
    return Line(
        request_id=entry["request_id"],
        began=ended - entry["duration_ms"] / 1000,
        recipient=entry.get("recipient"),
        to=entry.get("to"),
        status=entry["status"],
        reason=entry.get("reason"),
        channels=[one for one in entry.get("channels", ()) if isinstance(one, dict)],
    )


def joined(
    lines: Iterable[Line], sent: Iterable[Sent], seen: Iterable[Seen], most: int
) -> list[dict[str, Any]]:
    """Return the `most` newest notifications as the page shows them, newest first."""
    by_id: dict[str, list[Notification]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line.began):
        by_id[line.request_id].append(Notification(line.request_id, line.began, line=line))
    for request in sent:  # each has an id of its own
        known = by_id[request.request_id]
        if not known:
            known.append(Notification(request.request_id, request.began))
        known[0].sent = request
    for message in sorted(seen, key=lambda seen: seen.at):
        _add(by_id[message.message.request_id], message)
    return _newest(by_id, most)


def _add(same_id: list[Notification], seen: Seen) -> None:
    """Add a message to the likeliest notification, or to a new one."""
    request_id = seen.message.request_id
    fitting = [known for known in same_id if request_id and known.takes(seen)]
    if not fitting:
        fitting = [Notification(request_id, seen.at)]
        same_id += fitting
    min(fitting, key=lambda known: known.preference(seen)).seen.append(seen)


def _newest(by_id: Mapping[str, list[Notification]], most: int) -> list[dict[str, Any]]:
    with_keys = [
        (notification, f"{number} {request_id}")
        for request_id, same_id in by_id.items()
        for number, notification in enumerate(same_id)
    ]
    with_keys.sort(key=lambda each: each[0].began, reverse=True)
    return [notification.shown(key) for notification, key in with_keys[:most]]


def _result(status: int) -> tuple[str, str]:
    if status == HTTPStatus.OK:
        return "delivered", "good"
    # The service answers 503 when it has no room for the notification.
    if status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.SERVICE_UNAVAILABLE:
        return "refused", "wait"
    return "failed", "bad"


def _logged_way(channel: Mapping[str, Any]) -> Way:
    steps = tuple(_logged_step(tried) for tried in channel["providers"])
    if not steps:
        none = channel["outcome"] == "no_provider"
        steps = (Step("", "no provider" if none else "the providers could not be read", "bad"),)
    return Way(_CHANNELS.get(channel["channel"], channel["channel"]), steps)


def _logged_step(tried: Mapping[str, Any]) -> Step:
    outcome, reason = tried["outcome"], str(tried.get("reason", ""))
    if outcome == "accepted":
        return Step(tried["provider"], "accepted", "good")
    if outcome == "skipped":
        return Step(tried["provider"], f"skipped, {_SKIPS.get(reason, reason)}", "quiet")
    return Step(tried["provider"], _FAULTS.get(reason, reason or outcome), "bad")


def _seen_ways(seen: Iterable[Seen]) -> list[Way]:
    """Return the ways as the providers saw them; "email 1" and "email 2" are of one channel."""
    by_channel: dict[str, list[Step]] = defaultdict(list)
    for each in seen:
        channel = each.provider.partition(" ")[0].capitalize()
        by_channel[channel].append(Step(each.provider, *_answer(each.message.answer)))
    return [Way(channel, tuple(steps)) for channel, steps in sorted(by_channel.items())]


def _answer(answer: str) -> tuple[str, str]:
    if answer.startswith("200 OK"):
        return f"accepted{answer.removeprefix('200 OK')}", "good"
    if answer.startswith("waiting"):
        return "waiting", "wait"
    status = answer.partition(" ")[0]
    return (status if status.isdecimal() else answer.removeprefix("no answer: ")), "bad"
