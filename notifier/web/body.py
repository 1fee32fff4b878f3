"""Reads and validates the body of a request."""

import json
import re
from typing import Any, NoReturn

from flask import request
from marshmallow import EXCLUDE, Schema, ValidationError, fields, post_load, validate
from werkzeug.exceptions import RequestEntityTooLarge

from notifier.errors import InvalidRequest
from notifier.models import Message
from notifier.settings import MAX_BODY_BYTES

MAX_TO = 320
MAX_TITLE = 255
MAX_MESSAGE = 10_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _not_blank(value: str) -> None:
    if not value.strip():
        raise ValidationError("must not be empty or blank")


def _no_lone_surrogates(value: str) -> None:
    if _SURROGATE.search(value):
        raise ValidationError("must not contain lone surrogates")


def _no_control_characters(value: str) -> None:
    if _CONTROL.search(value):
        raise ValidationError("must not contain control characters")


_EMAIL = validate.Email(error="must be an email address")


def _email_address(value: str) -> None:
    _EMAIL(value)
    if not value.isprintable():  # the validator accepts line separators and invisible characters
        raise ValidationError(_EMAIL.error)


class _Text(fields.String):
    """A required string of 1 to `longest` characters that are not all white space.

    Only the first broken rule is reported.
    """

    default_error_messages = {  # noqa: RUF012 marshmallow merges these over the class hierarchy
        "required": "is missing",
        "null": "must not be null",
        "invalid": "must be a string",
    }

    def __init__(self, longest: int, *rules: Any) -> None:
        too_long = f"must be at most {longest} characters"
        length = validate.Length(max=longest, error=too_long)
        super().__init__(
            required=True,
            validate=_first_of(_not_blank, length, _no_lone_surrogates, *rules),
        )


def _first_of(*rules: Any) -> Any:
    def check(value: str) -> None:
        for rule in rules:
            rule(value)

    return check


class NotificationSchema(Schema):
    """The body of a request: `{"to", "title", "message"}`, other fields ignored."""

    class Meta:
        unknown = EXCLUDE

    to = _Text(MAX_TO, _no_control_characters, _email_address)
    title = _Text(MAX_TITLE, _no_control_characters)
    message = _Text(MAX_MESSAGE)

    @post_load
    def _make(self, data: dict[str, str], **_: Any) -> Message:
        return Message(**data)


_SCHEMA = NotificationSchema()  # loading does not change it, so all threads share it


def read_message() -> Message:
    """Return the message in the body of the request.

    Raises:
        InvalidRequest: its message names the field and the problem.
        RequestEntityTooLarge: the body is larger than `MAX_BODY_BYTES`.
    """
    return _parse(_read_json())


def _parse(body: object) -> Message:
    if not isinstance(body, dict):
        raise InvalidRequest("body: must be a JSON object")
    try:
        message: Message = _SCHEMA.load(body)
    except ValidationError as error:
        raise InvalidRequest(_joined(error.messages_dict)) from None
    return message


def _joined(problems: dict[str, Any]) -> str:
    """Write `{"to": ["is missing"]}` as `to: is missing`."""
    return "; ".join(f"{name}: {texts[0]}" for name, texts in problems.items())


def _read_json() -> object:
    """Return the parsed body; its content type does not matter.

    Raises:
        InvalidRequest: the body is not UTF-8 or not JSON, too deep, or has too long a number.
        RequestEntityTooLarge: the body is larger than `MAX_BODY_BYTES`.
    """
    try:
        text = _read_body().decode()
    except UnicodeDecodeError:
        raise InvalidRequest("body: must be UTF-8") from None
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
