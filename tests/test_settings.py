"""What the environment sets: defaults, good values, and what is said about wrong ones."""

import json
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import certifi
import pytest

from notifier import settings as settings_module
from notifier.settings import (
    MIN_DEADLINE,
    WITHOUT_EFFECT,
    Settings,
    SettingsError,
    available_cpus,
    parse_duration,
    settings_or_exit,
)

PASSWORD = "hunter2-p4ss"

REQUIRED = {
    "DB_HOST": "db.example.com",
    "DB_PORT": "5432",
    "DB_NAME": "notifications",
    "DB_USERNAME": "notifier",
    "DB_PASSWORD": PASSWORD,
}

VALUES_OF_REQUIRED = {
    "db_host": "db.example.com",
    "db_port": 5432,
    "db_name": "notifications",
    "db_username": "notifier",
    "db_password": PASSWORD,
}

DEFAULTS = {
    "app_name": "notification-service",
    "log_level": "INFO",
    "http_server_port": 8080,
    "web_concurrency": min(4, available_cpus()),
    "web_threads": 32,
    "drain_delay": 0.0,
    "http_client_timeout": 5.0,
    "notify_deadline": 15.0,
    "circuit_breaker_max_half_open_requests": 5,
    "circuit_breaker_open_state_timeout": 60.0,
    "circuit_breaker_min_requests_before_trip": 3,
    "circuit_breaker_failure_threshold_percent": 60,
    "circuit_breaker_window": 60.0,
    "cache_expired_time": 600.0,
    "db_sslmode": "disable",
    "requests_ca_bundle": None,
    "curl_ca_bundle": None,
}

OPTIONAL = [name.upper() for name in DEFAULTS]

DURATION = "a duration such as 500ms, 5s or 1m30s, from 1ms to 24h"
DELAY = "0s or a duration such as 500ms or 5s, up to 24h"
COUNT = "a whole number from 1 to 1000000"
PORT = "a whole number from 1 to 65535"
LISTEN_PORT = "a port such as 8080 or :8080"
PATH = "a readable PEM file, or folder, of certificates"

COUNTS = [
    "CIRCUIT_BREAKER_MAX_HALF_OPEN_REQUESTS",
    "CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP",
]
DURATIONS = [
    "HTTP_CLIENT_TIMEOUT",
    "NOTIFY_DEADLINE",
    "CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT",
    "CIRCUIT_BREAKER_WINDOW",
    "CACHE_EXPIRED_TIME",
]
NO_NUMBERS = [
    "-1",
    "+1",
    "1.0",
    "1e3",
    "1_000",
    "0x1f",
    "\uff11",
    "\u0661",
    "1 0",
    "one",
    "9" * 30,
]

GOOD = [
    ("APP_NAME", "notifier-eu", "notifier-eu"),
    ("APP_NAME", " padded ", "padded"),
    ("APP_NAME", "benachrichtigung-\u00fc", "benachrichtigung-\u00fc"),
    *[("LOG_LEVEL", text, "DEBUG") for text in ("debug", "DEBUG", "Debug", " debug ")],
    ("LOG_LEVEL", "info", "INFO"),
    ("LOG_LEVEL", "warn", "WARNING"),
    ("LOG_LEVEL", "warning", "WARNING"),
    ("LOG_LEVEL", "error", "ERROR"),
    ("LOG_LEVEL", "fatal", "CRITICAL"),
    ("LOG_LEVEL", "critical", "CRITICAL"),
    ("HTTP_SERVER_PORT", "9090", 9090),
    ("HTTP_SERVER_PORT", ":9090", 9090),
    ("HTTP_SERVER_PORT", "1", 1),
    ("HTTP_SERVER_PORT", "65535", 65535),
    ("WEB_CONCURRENCY", "1", 1),
    ("WEB_CONCURRENCY", "256", 256),
    ("WEB_THREADS", "1", 1),
    ("WEB_THREADS", "512", 512),
    *[(name, text, int(text)) for name in COUNTS for text in ("1", "7", "1000000")],
    ("CIRCUIT_BREAKER_FAILURE_THRESHOLD_PERCENT", "1", 1),
    ("CIRCUIT_BREAKER_FAILURE_THRESHOLD_PERCENT", "100", 100),
    ("HTTP_CLIENT_TIMEOUT", "500ms", 0.5),
    *[(name, "1m30s", 90.0) for name in DURATIONS],
    *[("DRAIN_DELAY", text, 0.0) for text in ("0", "0s", "0ms", "0m0.0s")],
    ("DRAIN_DELAY", "5s", 5.0),
    ("DB_HOST", "/var/run/postgresql", "/var/run/postgresql"),
    ("DB_PORT", "6432", 6432),
    ("DB_NAME", "other", "other"),
    ("DB_USERNAME", "other", "other"),
    ("DB_PASSWORD", " kept as it is ", " kept as it is "),
    *[
        ("DB_SSLMODE", mode, mode)
        for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
    ],
    ("REQUESTS_CA_BUNDLE", certifi.where(), certifi.where()),
    ("CURL_CA_BUNDLE", str(Path(__file__).parent), str(Path(__file__).parent)),
]

WRONG = [
    *[("LOG_LEVEL", text, "one of debug, info, warn") for text in ("loud", "10", "info,debug")],
    *[
        ("HTTP_SERVER_PORT", text, LISTEN_PORT)
        for text in [*NO_NUMBERS, "0", "65536", ":", "::8080", ":-1", "0.0.0.0:8080", "8080/tcp"]
    ],
    *[("DB_PORT", text, PORT) for text in [*NO_NUMBERS, "0", "65536", ":5432"]],
    *[
        ("WEB_CONCURRENCY", text, "a whole number from 1 to 256")
        for text in [*NO_NUMBERS, "0", "257", "auto"]
    ],
    *[
        ("WEB_THREADS", text, "a whole number from 1 to 512")
        for text in [*NO_NUMBERS, "0", "513", "\u00b2"]
    ],
    *[(name, text, COUNT) for name in COUNTS for text in [*NO_NUMBERS, "0", "1000001"]],
    *[
        ("CIRCUIT_BREAKER_FAILURE_THRESHOLD_PERCENT", text, "a whole number from 1 to 100")
        for text in [*NO_NUMBERS, "0", "101", "60%", "0.6"]
    ],
    *[(name, text, DURATION) for name in DURATIONS for text in ("5", "-5s", "0s", "25h", "soon")],
    *[("DRAIN_DELAY", text, DELAY) for text in ("5", "-5s", "0s0", "0x", "25h", "none")],
    *[("DB_SSLMODE", text, "one of disable, allow, prefer") for text in ("on", "true", "verify")],
    *[
        (name, text, PATH)
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        for text in ("/no/such/file.pem", f"{__file__}/below-a-file", __file__)
    ],
]


def read(**environ: str) -> Settings:
    return Settings.from_env(REQUIRED | environ)


def problem(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ)
    return str(raised.value)


def test_without_variables_the_defaults_hold() -> None:
    assert asdict(read()) == DEFAULTS | VALUES_OF_REQUIRED


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_variable_counts_as_unset(empty: str) -> None:
    assert read(**dict.fromkeys(OPTIONAL, empty)) == read()


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_good_value_is_read(name: str, text: str, value: object) -> None:
    # A deadline that no time-out of the table exceeds.
    assert asdict(read(**{"NOTIFY_DEADLINE": "1h", name: text}))[name.lower()] == value


@pytest.mark.parametrize(("name", "text", "expected"), WRONG)
def test_a_wrong_value_is_named_with_its_variable_and_what_is_expected(
    name: str, text: str, expected: str
) -> None:
    message = problem(REQUIRED | {name: text})
    shown = json.dumps(text[:100])
    assert message.startswith(f"{name} is {shown}: expected {expected}")
    assert PASSWORD not in message


def test_every_variable_is_in_the_tables_of_good_and_wrong_values() -> None:
    every = {field.name.upper() for field in fields(Settings)}
    any_text = {"APP_NAME", "DB_HOST", "DB_NAME", "DB_USERNAME", "DB_PASSWORD"}
    assert {name for name, *_ in GOOD} == every
    assert {name for name, *_ in WRONG} == every - any_text


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("empty", [None, "", " "])
def test_a_missing_required_variable_is_named(name: str, empty: str | None) -> None:
    environ = {key: value for key, value in REQUIRED.items() if key != name}
    if empty is not None:
        environ[name] = empty
    expected = PORT if name == "DB_PORT" else "a text"
    assert problem(environ) == f"{name} is missing: expected {expected}"


def test_several_problems_are_reported_together() -> None:
    environ = {"DB_PASSWORD": PASSWORD, "DB_NAME": "n", "DB_PORT": "x", "WEB_THREADS": "0"}
    message = problem(environ)
    assert message.split("; ") == [
        'WEB_THREADS is "0": expected a whole number from 1 to 512',
        "DB_HOST is missing: expected a text",
        f'DB_PORT is "x": expected {PORT}',
        "DB_USERNAME is missing: expected a text",
    ]


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\rb", "a\x0bb", "a\x0cb", "a\x1eb", "a\x1b[2Jb"]
)
@pytest.mark.parametrize("name", ["LOG_LEVEL", "HTTP_CLIENT_TIMEOUT", "WEB_THREADS"])
def test_the_message_is_one_line_whatever_the_value_holds(name: str, text: str) -> None:
    message = problem(REQUIRED | {name: text})
    assert message.splitlines() == [message]
    assert "\x1b" not in message


def test_of_a_long_value_only_the_beginning_is_shown() -> None:
    message = problem(REQUIRED | {"LOG_LEVEL": "x" * 10_000})
    assert "x" * 100 in message
    assert "x" * 101 not in message


def test_a_path_too_long_for_the_system_is_a_wrong_value() -> None:
    message = problem(REQUIRED | {"REQUESTS_CA_BUNDLE": "/" + "x" * 10_000})
    assert message.startswith('REQUESTS_CA_BUNDLE is "/xxx')


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("5s", 5.0),
        ("1m30s", 90.0),
        ("10m", 600.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("5.s", 5.0),
        ("1h1m1s1ms", 3661.001),
        ("1m1m", 120.0),
        ("30s1m", 90.0),
        ("1500us", 0.0015),
        ("1500\u00b5s", 0.0015),
        ("1500\u03bcs", 0.0015),
        ("1500000ns", 0.0015),
        ("0h5s", 5.0),
        ("1ms", 0.001),
        ("1000000ns", 0.001),
        ("24h", 86_400.0),
        ("86400000000\u00b5s", 86_400.0),
        ("23h59m60s", 86_400.0),
    ],
)
def test_a_duration_is_read_as_go_writes_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        *["5", "-5s", "+5s", "5 s", " 5s", "5s ", "5s\n", "", "s", ".s", ".", "1d", "1w", "1y"],
        *[
            "5S",
            "5M",
            "5sec",
            "5s5",
            "1,5s",
            "1..5s",
            "1e3s",
            "5s,",
            "1m 30s",
            "\uff15s",
            "\u0665s",
        ],
        *["25h", "24h1ms", "1441m", "0s", "0h0m0s", "999us", "0.5ms", "9" * 40 + "h"],
        *["nan", "nans", "inf", "infs", "0x5s", "1_0s", "one"],
    ],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        parse_duration(text)


def test_the_deadline_is_three_attempts_unless_it_is_set() -> None:
    assert read(HTTP_CLIENT_TIMEOUT="2s").notify_deadline == 6.0
    assert read(HTTP_CLIENT_TIMEOUT="2s", NOTIFY_DEADLINE="2s").notify_deadline == 2.0
    assert read(HTTP_CLIENT_TIMEOUT="50ms").notify_deadline == MIN_DEADLINE


@pytest.mark.parametrize(
    ("timeout", "deadline"),
    [("5s", "4999ms"), ("20s", "15s"), ("100ms", "249ms")],
)
def test_a_deadline_below_one_attempt_is_refused(timeout: str, deadline: str) -> None:
    environ = {"HTTP_CLIENT_TIMEOUT": timeout, "NOTIFY_DEADLINE": deadline}
    message = problem(REQUIRED | environ)
    assert message.startswith("NOTIFY_DEADLINE is ")
    assert "HTTP_CLIENT_TIMEOUT" in message
    assert "0.3s" in message
    assert message.splitlines() == [message]


def test_a_deadline_below_one_attempt_is_shown_in_seconds() -> None:
    message = problem(REQUIRED | {"NOTIFY_DEADLINE": "1s500ms"})
    assert message.startswith("NOTIFY_DEADLINE is 1.5s: expected at least one attempt")


def test_variables_of_the_go_service_without_effect_are_accepted() -> None:
    assert read(**dict.fromkeys(WITHOUT_EFFECT, "whatever")) == read()


def test_variables_are_read_in_capitals_only() -> None:
    assert read(web_threads="7", log_level="debug") == read()


def test_settings_are_frozen() -> None:
    settings = read()
    for field in fields(Settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, field.name, None)


def test_the_password_is_hidden_from_repr() -> None:
    shown = repr(read())
    assert "db.example.com" in shown
    assert PASSWORD not in shown
    assert "db_password" not in shown


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", REQUIRED | {"WEB_THREADS": "7"})
    assert settings_or_exit().web_threads == 7


def test_the_number_of_workers_follows_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert settings_module.available_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert settings_module.available_cpus() == 1


def test_a_wrong_environment_ends_the_process_with_one_line() -> None:
    environ = REQUIRED | {"LOG_LEVEL": "lo\nud", "WEB_THREADS": os.fsdecode(b"\xff")}
    start = "from notifier.settings import settings_or_exit; settings_or_exit()"
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=Path(__file__).parent.parent,
        env=environ,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith('notifier cannot start: LOG_LEVEL is "lo\\nud": expected one of ')
    assert "; WEB_THREADS is " in line
    assert PASSWORD not in line
