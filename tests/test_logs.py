"""Log lines: their fields, and the texts and secrets that they never contain."""

import contextvars
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from notifier import logs

SECRET = "swordfish"

QUIET = ["urllib3", "requests", "psycopg", "psycopg.pool", "yoyo", "werkzeug"]

log = logging.getLogger("notifier.example")

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The output of the configured logs; pytest's logging is restored afterwards."""
    root = logging.getLogger()
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in QUIET]
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("notification-service", "INFO", logging.StreamHandler(stream))
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, level in before:
        logger.setLevel(level)


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def in_context(request_id: str | None, act: Callable[[], Any]) -> Any:
    context = contextvars.copy_context()
    context.run(logs.request_id.set, request_id)
    return context.run(act)


def test_a_line_has_time_level_logger_message_app_and_request_id_in_this_order(
    lines: Lines,
) -> None:
    in_context("req-1", lambda: log.warning("cache %s", "miss"))
    (line,) = lines()
    timestamp = line.pop("timestamp")
    assert list(line.items()) == [
        ("level", "WARNING"),
        ("logger", "notifier.example"),
        ("message", "cache miss"),
        ("app", "notification-service"),
        ("request_id", "req-1"),
    ]
    assert datetime.fromisoformat(timestamp).utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("created", "timestamp"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp(), "2024-02-29T23:59:59.000Z"),
        (datetime(2024, 7, 1, 12, 0, 0, 250_000, UTC).timestamp(), "2024-07-01T12:00:00.250Z"),
    ],
)
def test_the_timestamp_is_rfc_3339_in_utc(created: float, timestamp: str, lines: Lines) -> None:
    record = log.makeRecord(log.name, logging.INFO, __file__, 1, "an event", (), None)
    record.created = created
    log.handle(record)
    assert lines()[0]["timestamp"] == timestamp


def test_the_fields_of_an_event_are_on_its_line(lines: Lines) -> None:
    channels = [{"channel": "Email", "attempts": 2}]
    log.info("delivered", extra={"host": "mail.example.com:443", "channels": channels, "n": None})
    (line,) = lines()
    assert line["host"] == "mail.example.com:443"
    assert line["channels"] == channels
    assert line["n"] is None
    assert "taskName" not in line


def test_outside_a_request_the_request_id_is_null(lines: Lines) -> None:
    in_context(None, lambda: log.info("started"))
    assert lines()[0]["request_id"] is None


def test_a_pool_thread_that_runs_in_a_copied_context_logs_the_request_id(lines: Lines) -> None:
    def fan_out() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(log.info, "without").result()
            pool.submit(contextvars.copy_context().run, log.info, "with").result()

    in_context("req-2", fan_out)
    assert [(line["message"], line["request_id"]) for line in lines()] == [
        ("without", None),
        ("with", "req-2"),
    ]


def test_two_requests_at_once_keep_their_ids_apart(lines: Lines) -> None:
    contexts = {name: contextvars.copy_context() for name in ("req-3", "req-4")}
    for name, context in contexts.items():
        context.run(logs.request_id.set, name)
    for name, context in contexts.items():
        context.run(log.info, name)
    assert [line["request_id"] for line in lines()] == ["req-3", "req-4"]


def test_lines_below_the_level_are_not_written(lines: Lines) -> None:
    log.debug("a detail")
    log.info("an event")
    assert [line["message"] for line in lines()] == ["an event"]


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "two\r\nlines",
        "b\u00fccher \U0001f600",
        "a\u2028b\u0085c",
        "lone \ud800",
        "\x00\x1b",
    ],
    ids=ascii,
)
def test_whatever_is_logged_stays_one_line_of_ascii(
    text: str, stream: io.StringIO, lines: Lines
) -> None:
    log.info("%s", text, extra={"provider": text})
    written = stream.getvalue()
    assert written.isascii()
    assert written.count("\n") == 1
    assert written.endswith("\n")
    (line,) = lines()
    assert line["message"] == line["provider"] == text


def fail() -> None:
    raise ConnectionError(f"cannot reach https://user:{SECRET}@mail.example.com")


def fail_with_a_cause() -> None:
    try:
        fail()
    except ConnectionError as error:
        raise LookupError(SECRET) from error


def fail_while_handling() -> None:
    try:
        fail()
    except ConnectionError:
        raise KeyError(SECRET)  # noqa: B904 the context is what is tested


def fail_and_hide_why() -> None:
    try:
        fail()
    except ConnectionError:
        raise json.JSONDecodeError(SECRET, SECRET, 0) from None


def logged_exception(act: Callable[[], None], lines: Lines) -> str:
    try:
        act()
    except Exception:
        log.exception("it failed")
    (line,) = lines()
    assert line["level"] == "ERROR"
    assert line["message"] == "it failed"
    assert SECRET not in json.dumps(line)
    return str(line["exc_info"])


@pytest.mark.parametrize(
    ("act", "classes"),
    [
        (fail, ["builtins.ConnectionError"]),
        (fail_with_a_cause, ["builtins.ConnectionError", "builtins.LookupError"]),
        (fail_while_handling, ["builtins.ConnectionError", "builtins.KeyError"]),
        (fail_and_hide_why, ["json.decoder.JSONDecodeError"]),
    ],
)
def test_an_exception_is_logged_as_classes_and_frames_without_its_text(
    act: Callable[[], None], classes: list[str], lines: Lines
) -> None:
    text = logged_exception(act, lines)
    found = [line for line in text.splitlines() if not line.startswith(" ")]
    assert found == classes
    assert f"in {act.__name__}" in text
    assert ("in fail\n" in text) == (act is not fail_and_hide_why)


def test_an_exception_without_a_traceback_is_logged_as_its_class() -> None:
    assert logs.frames(ValueError(SECRET)) == "builtins.ValueError"


def test_an_exception_that_another_handler_formatted_is_still_logged_without_its_text(
    lines: Lines,
) -> None:
    other = logging.StreamHandler(io.StringIO())
    logging.getLogger().handlers.insert(0, other)
    text = logged_exception(fail, lines)
    assert SECRET in other.stream.getvalue()  # the other handler did format it
    assert text.startswith("builtins.ConnectionError")


@pytest.mark.parametrize(
    ("to", "masked"),
    [
        ("bob@example.com", "b***@example.com"),
        ("b@example.com", "b***@example.com"),
        ("first.last+tag@sub.example.com", "f***@sub.example.com"),
        ('"a@b"@example.com', '"***@example.com'),
        ("@example.com", "***@example.com"),
        ("\u00fcber@example.com", "\u00fc***@example.com"),
    ],
)
def test_a_masked_address_shows_the_first_character_and_the_domain(to: str, masked: str) -> None:
    assert logs.mask_address(to) == masked


def test_other_lines_of_gunicorn_are_kept(lines: Lines) -> None:
    logging.getLogger("gunicorn.error").info("Booting worker with pid: %s", 7)
    assert lines()[0]["message"] == "Booting worker with pid: 7"


@pytest.mark.parametrize("library", [*QUIET, "urllib3.connectionpool", "yoyo.migrations"])
def test_libraries_that_quote_hosts_and_texts_are_silenced(
    library: str, stream: io.StringIO
) -> None:
    logger = logging.getLogger(library)
    for act in (logger.debug, logger.info, logger.warning, logger.error):
        act("Retrying %s", SECRET)
    assert stream.getvalue() == ""


def test_a_line_is_written_once_even_if_logs_are_configured_twice(
    stream: io.StringIO, lines: Lines
) -> None:
    logs.configure("other-name", "WARNING", logging.StreamHandler(stream))
    log.info("an event")
    log.warning("a warning")
    assert [(line["message"], line["app"]) for line in lines()] == [("a warning", "other-name")]


def test_a_frequent_event_is_logged_once_a_second_with_its_count() -> None:
    now = 0.0
    limiter = logs.OncePerSecond(lambda: now)
    assert [limiter.times("a") for _ in range(3)] == [1, 0, 0]
    assert limiter.times("b") == 1
    now = logs.LOG_INTERVAL - 0.001
    assert limiter.times("a") == 0
    now = logs.LOG_INTERVAL
    assert [limiter.times(key) for key in "aab"] == [4, 0, 1]
