"""A log entry as a terminal shows it."""

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from io import StringIO
from typing import Any

import pytest

from notifier import logs
from tools.dev import readable

COMMON: dict[str, Any] = {
    "timestamp": "2026-11-28T11:48:00.123Z",
    "level": "INFO",
    "logger": "notifier",
    "message": "listening",
    "app": "notification-service",
    "request_id": None,
}
TIME = f"{datetime.fromisoformat(COMMON['timestamp']).astimezone():%H:%M:%S}"
ACCEPTED = {"provider": "push 1", "outcome": "accepted", "ms": 3}


def shown(*, colour: bool = False, **fields: object) -> str:
    return readable.text(COMMON | fields, colour=colour)


def channel(*providers: dict[str, Any], name: str = "Email") -> dict[str, Any]:
    return {"channel": name, "outcome": "failed", "providers": list(providers)}


def request(*channels: dict[str, Any], **fields: object) -> str:
    """Return a notify request's line without its time and level."""
    line = {"method": "POST", "route": "/notify", "status": 200, "duration_ms": 16.5}
    line |= {"recipient": "seller", "to": "s***@example.com", "channels": [*channels]}
    return shown(message="request", **line | fields).removeprefix(f"{TIME} INFO    ")


def test_a_line_has_local_time_level_message_and_fields() -> None:
    line = shown(level="WARNING", message="breaker", host="127.0.0.1:9090", to_state="open")
    assert line == f"{TIME} WARNING breaker host=127.0.0.1:9090 to_state=open"


def test_a_value_with_spaces_is_quoted() -> None:
    assert shown(provider="email 1", empty="").endswith(' provider="email 1" empty=""')


def test_a_field_that_tells_nothing_is_left_out() -> None:
    assert shown(detail=None, times=1).endswith(" listening")
    assert shown(times=2).endswith(" listening times=2")


def test_a_request_shows_status_recipient_duration_and_each_channels_way() -> None:
    failed = {"provider": "email 1", "outcome": "unknown", "reason": "503", "ms": 12}
    accepted = {"provider": "email 2", "outcome": "accepted", "ms": 3}
    line = request(channel(failed, accepted), channel(ACCEPTED, name="PushNotification"))
    assert line == ("200 seller 16.5 ms  email 1: 503 → email 2: accepted; push 1: accepted")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"outcome": "skipped", "reason": "open"}, "email 1: breaker open"),
        ({"outcome": "skipped", "reason": "deadline"}, "email 1: skipped (deadline)"),
        ({"outcome": "unknown", "reason": "timeout"}, "email 1: timeout"),
        ({"outcome": "rejected", "reason": "404"}, "email 1: 404"),
    ],
)
def test_a_way_names_the_reason_where_a_provider_did_not_accept(
    step: dict[str, str], text: str
) -> None:
    assert request(channel({"provider": "email 1"} | step)) == f"200 seller 16.5 ms  {text}"


def test_a_channel_without_a_provider_shows_its_outcome() -> None:
    assert request(channel(), status=500) == "500 seller 16.5 ms  Email: failed"


def test_a_request_that_reached_no_channel_shows_what_was_asked_for() -> None:
    line = shown(message="request", method="GET", route="unmatched", status=404, duration_ms=0.2)
    assert line == f"{TIME} INFO    404 GET unmatched 0.2 ms"


def test_a_request_shows_its_other_fields_too() -> None:
    assert request(channel(ACCEPTED), error="E102").endswith("push 1: accepted error=E102")


def test_a_failed_attempt_shows_its_provider_and_the_reason() -> None:
    attempt = {"channel": "Email", "provider": "acme", "provider_id": 5, "host": "127.0.0.1:1"}
    attempt |= {"outcome": "not_sent", "reason": "connect", "detail": "timed out", "times": 1}
    line = shown(message="attempt failed", **attempt)
    expected = 'attempt failed provider=acme host=127.0.0.1:1 reason=connect detail="timed out"'
    assert line == f"{TIME} INFO    {expected}"


@pytest.mark.parametrize(("status", "end"), [(200, "accepted"), (500, "request_id=order-1")])
def test_a_request_that_failed_shows_its_id(status: int, end: str) -> None:
    assert request(channel(ACCEPTED), status=status, request_id="order-1").endswith(end)


def test_colour_marks_level_and_field_names() -> None:
    assert shown(colour=True, level="ERROR", host="a") == (
        f"\033[2m{TIME}\033[0m \033[31mERROR  \033[0m listening \033[2mhost=\033[0ma"
    )


def test_control_characters_do_not_reach_the_terminal() -> None:
    line = shown(message="\033[2J", name="a\rb", lines="x\n\033[2J", k={"\033": "\x07"})
    assert "\033" not in line
    assert "\r" not in line
    assert "\\x1b[2J" in line
    assert request(channel({"provider": "\033c", "outcome": "accepted"})).endswith(
        "\\x1bc: accepted"
    )


@pytest.fixture
def stream() -> Iterator[StringIO]:
    """The output of the service's loggers."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = StringIO()
    logs.configure("notification-service", "INFO", logging.StreamHandler(stream))
    yield stream
    root.handlers[:], root.level = before


def test_an_exceptions_frames_stand_below_its_line(stream: StringIO) -> None:
    try:
        int("secret")
    except ValueError:
        logging.getLogger("notifier.test").exception("could not close", extra={"part": "a"})
    entry = readable.parse(stream.getvalue().encode())
    assert entry is not None
    first, *frames = readable.text(entry, colour=False).splitlines()
    assert first.endswith("ERROR   could not close part=a")
    assert frames[0] == "    builtins.ValueError"
    assert frames[1].startswith('      File "')
    assert frames[2] == '        int("secret")'


def test_the_services_own_lines_are_entries(stream: StringIO) -> None:
    logging.getLogger("notifier.test").info("héllo")
    entry = readable.parse(stream.getvalue().encode())
    assert entry is not None
    assert readable.text(entry, colour=False).endswith("INFO    héllo")


@pytest.mark.parametrize(
    "line",
    [
        b"Traceback (most recent call last):\n",
        b"\n",
        b"\xff\n",
        b"7\n",
        b"null\n",
        b'["timestamp"]\n',
        b'{"a": 1}\n',
        json.dumps(COMMON | {"timestamp": 7}).encode(),
        json.dumps(COMMON | {"timestamp": "yesterday"}).encode(),
        json.dumps(COMMON | {"level": 7}).encode(),
        json.dumps(COMMON | {"message": None}).encode(),
    ],
)
def test_other_lines_are_no_entries(line: bytes) -> None:
    assert readable.parse(line) is None
