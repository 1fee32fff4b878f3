"""Reads and validates the body of a request."""

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from flask import Flask, current_app, request
from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate
from werkzeug.exceptions import RequestEntityTooLarge

from notifier.addresses import Addresses
from notifier.characters import (
    BIDI_EMBEDDINGS_AND_OVERRIDES,
    CONTROL,
    CONTROL_EXCEPT_TAB_LF_CR,
    INVISIBLE,
    SURROGATES,
)
from notifier.errors import InvalidRequest
from notifier.models import Message
from notifier.settings import MAX_BODY_BYTES

MAX_TITLE = 255
MAX_MESSAGE = 10_000

_UNCODED = {"", "identity"}

_VISIBLE = re.compile(rf"[^\s{INVISIBLE}]")

# The names and ranges of the characters that a field may not contain.
_NOT_IN_TO = {"lone surrogates": SURROGATES, "control characters": CONTROL}
_NOT_IN_TITLE = _NOT_IN_TO | {
    "bidirectional embeddings or overrides": BIDI_EMBEDDINGS_AND_OVERRIDES
}
_NOT_IN_MESSAGE = _NOT_IN_TO | {"control characters": CONTROL_EXCEPT_TAB_LF_CR}

_Rule = Callable[[str], object]

_EXTENSION = "notifier.message_schema"


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValidationError("must not be empty or blank")
    if not _VISIBLE.search(value):
        raise ValidationError("must not consist of invisible characters only")


def _at_most(longest: int) -> _Rule:
    return validate.Length(max=longest, error=f"must be at most {longest} characters")


def _without(kinds: dict[str, str]) -> _Rule:
    """Return a rule that forbids the characters of `kinds`, given as their names and ranges."""
    forbidden = re.compile(f"[{''.join(kinds.values())}]")

    def check(value: str) -> None:
        found = forbidden.search(value)
        if found:
            names = (name for name, ranges in kinds.items() if re.match(f"[{ranges}]", found[0]))
            raise ValidationError(f"must not contain {next(names)}")

    return check


def _valid(addresses: Addresses) -> _Rule:
    def check(value: str) -> None:
        if problem := addresses.problem(value):
            raise ValidationError(problem)

    return check


class _Text(fields.String):
    """A required string with a visible character. Only the first broken rule is reported."""

    default_error_messages = {  # noqa: RUF012 marshmallow merges these over the class hierarchy
        "required": "is missing",
        "null": "must not be null",
        "invalid": "must be a string",
    }

    def __init__(self, *rules: _Rule) -> None:
        super().__init__(required=True, validate=_first_of(_not_blank, *rules))


def _first_of(*rules: _Rule) -> _Rule:
    def check(value: str) -> None:
        for rule in rules:
            rule(value)

    return check


class _MessageSchema(Schema):
    """Makes a `Message` of an object, whose other fields it ignores."""

    class Meta:
        unknown = EXCLUDE

    @post_load
    def _make(self, data: dict[str, str], **_: Any) -> Message:
        return Message(**data)


def message_schema(addresses: Addresses) -> Schema:
    """Return the schema of a body: `{"to", "title", "message"}`. All threads may share it."""
    schema = _MessageSchema.from_dict(
        {
            "to": _Text(_without(_NOT_IN_TO), _valid(addresses)),
            "title": _Text(_at_most(MAX_TITLE), _without(_NOT_IN_TITLE)),
            "message": _Text(_at_most(MAX_MESSAGE), _without(_NOT_IN_MESSAGE)),
        }
    )
    return schema()


def register(app: Flask, addresses: Addresses) -> None:
    """Let `read_message` check bodies in `app`, and addresses by `addresses`."""
    app.extensions[_EXTENSION] = message_schema(addresses)


def read_message() -> Message:
    """Return the message in the body of the request.

    Raises:
        InvalidRequest: its message names the field and the problem.
        RequestEntityTooLarge: the body is larger than `MAX_BODY_BYTES`.
    """
    return _parse(_read_json(), current_app.extensions[_EXTENSION])


def _parse(body: object, schema: Schema) -> Message:
    if not isinstance(body, dict):
        raise InvalidRequest("body: must be a JSON object")
    try:
        message: Message = schema.load(body)
    except ValidationError as error:
        raise InvalidRequest(_joined(error.messages_dict)) from None
    return message


def _joined(problems: dict[str, Any]) -> str:
    """Write `{"to": ["is missing"]}` as `to: is missing`."""
    return "; ".join(f"{name}: {texts[0]}" for name, texts in problems.items())


def _read_json() -> object:
    """Return the parsed body; its content type does not matter.

    Raises:
        InvalidRequest: the body is compressed, not UTF-8 or not JSON, too deep, or has too long a
            number.
        RequestEntityTooLarge: the body is larger than `MAX_BODY_BYTES`.
    """
    _require_identity(request.environ.get("HTTP_CONTENT_ENCODING", ""))
    try:
        text = _read_body().decode()
    except UnicodeDecodeError:
        raise InvalidRequest("body: must be UTF-8") from None
    if text.startswith("\ufeff"):
        raise InvalidRequest("body: must not begin with a byte order mark")
    if not text.strip():
        raise InvalidRequest("body: must not be empty, expected a JSON object")
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"body: not valid JSON at {where}") from None
    except RecursionError:
        raise InvalidRequest("body: nested too deeply") from None
    except ValueError:  # json takes numbers of any length, int() does not
        raise InvalidRequest("body: contains a number that is too long or not allowed") from None


def _require_identity(codings: str) -> None:
    """Refuse a compressed body; the header may list `identity`, or nothing."""
    if codings and not {coding.strip().lower() for coding in codings.split(",")} <= _UNCODED:
        raise InvalidRequest("Content-Encoding: must be absent or identity")


def _read_body() -> bytes:
    """Read the body in one call; werkzeug's limited stream would copy buffers of 64 KiB."""
    length = request.content_length
    if (length or 0) > MAX_BODY_BYTES:
        raise RequestEntityTooLarge
    try:
        if length is None:  # chunked, or no body
            body = request.stream.read(MAX_BODY_BYTES + 1)
        else:
            body = request.input_stream.read(length)
    except OSError:
        raise InvalidRequest("body: ends early, or its chunks are malformed") from None
    if len(body) > MAX_BODY_BYTES:
        raise RequestEntityTooLarge
    if len(body) < (length or 0):
        raise InvalidRequest("body: ends before its announced length")
    return body


def _no_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's parser accepts and RFC 8259 does not allow."""
    raise ValueError(name)


_JSON = json.JSONDecoder(parse_constant=_no_constant)  # json.loads would make one for each call
