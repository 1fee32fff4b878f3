"""The service's log for a terminal: short lines made of the JSON ones."""

import json
from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any

Entry = Mapping[str, Any]

# Every entry has these fields. A terminal shows the first two and the message.
_COMMON = {"timestamp", "level", "logger", "message", "app", "request_id"}

# A request's line shows these fields without their names, or leaves them out.
_REQUEST = {"method", "route", "status", "recipient", "duration_ms", "channels", "to"}

# Fields that an attempt's line omits, because the request's line repeats them.
_ATTEMPT = {"channel", "provider_id", "outcome"}

_DIM = "2"
_COLOURS = {"DEBUG": _DIM, "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


def parse(line: bytes) -> Entry | None:
    """Return the log entry that a line of the service's output holds; None if it holds none."""
    try:
        entry = json.loads(line)
        datetime.fromisoformat(entry["timestamp"])
        is_entry = isinstance(entry["level"], str) and isinstance(entry["message"], str)
    except (ValueError, LookupError, TypeError):
        return None
    return entry if is_entry else None


def text(entry: Entry, *, colour: bool) -> str:
    """Return the entry for a terminal: local time, level, message and fields in one line.

    A value of several lines follows below, indented. A notify request shows what happened at each
    provider of each channel.
    """

    def paint(code: str, part: str) -> str:
        return painted(code, part) if colour else part

    moment = datetime.fromisoformat(entry["timestamp"]).astimezone()
    level = paint(_COLOURS.get(entry["level"], "0"), f"{entry['level']:<7}")
    is_request = entry["message"] == "request"
    shown = [_request(entry) if is_request else _printable(entry["message"])]
    known = _REQUEST if is_request else _ATTEMPT if "provider_id" in entry else set()
    left_out = _COMMON | known
    if is_request and entry["status"] >= HTTPStatus.BAD_REQUEST:
        left_out -= {"request_id"}  # leads to all lines of the request
    blocks = []
    for name, value in entry.items():
        if name in left_out or value is None or (name, value) == ("times", 1):
            continue
        if isinstance(value, str) and "\n" in value:
            blocks += [f"    {_printable(line)}" for line in value.splitlines()]
        else:
            shown.append(paint(_DIM, f"{name}=") + _value(value))
    return "\n".join([" ".join([paint(_DIM, f"{moment:%H:%M:%S}"), level, *shown]), *blocks])


def painted(code: str, part: str) -> str:
    """Return `part` in the colour or style of an ANSI code."""
    return f"\033[{code}m{part}\033[0m"


def _request(entry: Entry) -> str:
    what = entry.get("recipient") or f"{entry.get('method')} {entry.get('route')}"
    ways = "; ".join(_way(channel) for channel in entry.get("channels", []))
    summary = f"{entry.get('status')} {what} {entry.get('duration_ms')} ms  {ways}"
    return _printable(summary.rstrip())


def _way(channel: Entry) -> str:
    """Return what happened at each provider of the channel, in order."""
    steps = [f"{step['provider']}: {_step(step)}" for step in channel.get("providers", [])]
    return " → ".join(steps) or f"{channel['channel']}: {channel['outcome']}"


def _step(step: Entry) -> str:
    reason = step.get("reason")
    if step["outcome"] == "skipped":
        return "breaker open" if reason == "open" else f"skipped ({reason})"
    return str(reason or step["outcome"])


def _value(value: object) -> str:
    is_word = isinstance(value, str) and value and " " not in value
    return _printable(str(value) if is_word else json.dumps(value, ensure_ascii=False))


def _printable(line: str) -> str:
    """Return the line with escapes for the characters that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
