"""The kinds of values that a variable can have: which texts each accepts and refuses."""

import re
from pathlib import Path

import certifi
import pytest

from notifier import environ
from notifier.environ import (
    ADDRESS,
    CA_BUNDLE,
    COUNT,
    DELAY,
    DURATION,
    FILE,
    HOSTS,
    LISTEN_PORT,
    PORT,
    PORTS,
    ROOT_CERT,
    SWITCH,
    TEXT,
    Kind,
    one_of,
    parse_duration,
    whole_number,
)

HERE = str(Path(__file__).parent)

NO_NUMBERS = [
    "-1",
    "+1",
    "1.0",
    "1e3",
    "1_000",
    "0x1f",
    "\uff11",
    "\u0661",
    "\u00b2",
    "1 0",
    "60%",
    "one",
    "9" * 30,
]

# For each kind: its `expected` text, valid texts with their values, and invalid texts.
KINDS: list[tuple[Kind, str, dict[str, object], list[str]]] = [
    (TEXT, "text", {"benachrichtigung-\u00fc": "benachrichtigung-\u00fc"}, []),
    (
        whole_number(1, 256),
        "a whole number from 1 to 256",
        {"1": 1, "7": 7, "256": 256},
        [*NO_NUMBERS, "0", "257", "auto"],
    ),
    (
        COUNT,
        "a whole number from 1 to 1000000",
        {"1": 1, "7": 7, "1000000": 1_000_000},
        [*NO_NUMBERS, "0", "1000001"],
    ),
    (
        PORT,
        "a whole number from 1 to 65535",
        {"1": 1, "65535": 65535},
        [*NO_NUMBERS, "0", "65536", ":5432"],
    ),
    (
        LISTEN_PORT,
        "a port such as 8080 or :8080",
        {"9090": 9090, ":9090": 9090, "1": 1, "65535": 65535},
        [*NO_NUMBERS, "0", "65536", ":", "::8080", ":-1", "0.0.0.0:8080", "8080/tcp"],
    ),
    (
        ADDRESS,
        "an IP address without brackets, such as 127.0.0.1 or ::1",
        {
            "0.0.0.0": "0.0.0.0",
            "127.0.0.1": "127.0.0.1",
            "::": "::",
            "2001:DB8:0::7": "2001:db8::7",
        },
        [
            *("localhost", "*", "0", "8080", "[::1]", "[::", "::1]", "127.1", "127.0.0.01"),
            *("127.0.0.1:8080", "[::1]:8080", "10.0.0.0/8", "fe80::1%eth0", "1.2.3.4,::1", "::g"),
        ],
    ),
    (
        PORTS,
        "a whole number from 1 to 65535, or several, separated by commas",
        {"6432": "6432", "1,65535": "1,65535", "5432 , 05433": "5432,5433"},
        [*NO_NUMBERS, "0", "65536", ":5432", "5432,", ",5432", "5432,,5433", "5432;5433"],
    ),
    (
        HOSTS,
        "a host, or several, separated by commas",
        {
            "/var/run/postgresql": "/var/run/postgresql",
            "a,b": "a,b",
            "a.example.com, b.example.com , ::1": "a.example.com,b.example.com,::1",
        },
        [",", "a,", ",a", "a,,b", "a, ,b"],
    ),
    (
        SWITCH,
        "one of on, off",
        {"on": "on", "off": "off", "OFF": "off"},
        ["true", "0", "on,off"],
    ),
    (
        one_of({"warn": "WARNING", "warning": "WARNING", "fatal": "CRITICAL"}),
        "one of warn, warning, fatal",
        {"warn": "WARNING", "WARN": "WARNING", "Warning": "WARNING", "fatal": "CRITICAL"},
        ["loud", "10", "warn,fatal", "warn "],
    ),
    (
        DURATION,
        "a duration such as 500ms, 5s or 1m30s, from 1ms to 24h",
        {"500ms": 0.5, "1m30s": 90.0},
        ["5", "-5s", "0s", "25h", "soon"],
    ),
    (
        DELAY,
        "0s or a duration such as 500ms or 5s, up to 24h",
        {"0": 0.0, "0s": 0.0, "0ms": 0.0, "0m0.0s": 0.0, "5s": 5.0},
        ["5", "-5s", "0s0", "0x", "25h", "none"],
    ),
    (FILE, "a readable file", {__file__: __file__}, ["/no/file", HERE]),
    (
        ROOT_CERT,
        "a readable PEM file of certificates",
        {certifi.where(): certifi.where()},
        ["/no/such/file.pem", HERE, __file__, "system"],
    ),
    (
        CA_BUNDLE,
        "a readable PEM file, or folder, of certificates",
        {certifi.where(): certifi.where(), HERE: HERE},
        ["/no/such/file.pem", f"{__file__}/below-a-file", __file__],
    ),
]


def accepts(kind: Kind, text: str) -> bool:
    try:
        kind.parse(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "expected", "good", "wrong"), KINDS, ids=[expected for _, expected, *_ in KINDS]
)
def test_a_kind_parses_valid_texts_refuses_others_and_says_what_it_expects(
    kind: Kind, expected: str, good: dict[str, object], wrong: list[str]
) -> None:
    assert {text: kind.parse(text) for text in good} == good
    assert [text for text in wrong if accepts(kind, text)] == []
    assert kind.expected == expected


def test_every_kind_is_tested() -> None:
    named = [kind for kind in vars(environ).values() if isinstance(kind, Kind)]
    assert named
    assert [kind.expected for kind in named if kind not in [tested for tested, *_ in KINDS]] == []


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
def test_a_duration_is_parsed_in_gos_format(text: str, seconds: float) -> None:
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
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        parse_duration(text)
