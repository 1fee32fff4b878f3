"""The kinds of environment variables: each turns a variable's text into a value."""

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

# Go takes the micro sign and the Greek letter mu.
_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_TERM = re.compile(rf"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)({'|'.join(_UNITS)})")
_MAX_DURATION = 24 * 3600.0


class Kind(NamedTuple):
    """Turns a variable's text into a value; `parse` raises ValueError for a wrong text."""

    expected: str
    parse: Callable[[str], Any]


def parse_duration(text: str, shortest: float = 0.001) -> float:
    """Return the seconds of a duration written as in Go (`1m30s`).

    Source: the grammar of Go's `time.ParseDuration`, without a sign.

    Raises:
        ValueError: the text has another form, or is not within `shortest` seconds and 24h.
    """
    terms = _TERM.findall(text)
    if not terms or "".join(number + unit for number, unit in terms) != text:
        raise ValueError(text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in terms)
    if not shortest <= seconds <= _MAX_DURATION:
        raise ValueError(text)
    return seconds


def list_of(kind: "Kind") -> "Kind":
    """Return the kind of a list separated by commas, as libpq takes it."""

    def parse(text: str) -> str:
        return ",".join(str(kind.parse(part.strip())) for part in text.split(","))

    return Kind(f"{kind.expected}, or several, separated by commas", parse)


def _parse_delay(text: str) -> float:
    return 0.0 if text == "0" else parse_duration(text, shortest=0.0)


def whole_number(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        # int() also takes signs, underscores and other scripts' digits.
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return Kind(f"a whole number from {low} to {high}", parse)


def one_of(choices: Mapping[str, str]) -> Kind:
    def parse(text: str) -> str:
        try:
            return choices[text.lower()]
        except KeyError:
            raise ValueError(text) from None

    return Kind(f"one of {', '.join(choices)}", parse)


def trust(context: ssl.SSLContext, ca_bundle: str) -> None:
    """Let `context` trust the authorities in a PEM file, or in a folder of them by hash.

    Raises:
        OSError: `ca_bundle` can't be read, or is not a PEM file of certificates.
    """
    where = "capath" if Path(ca_bundle).is_dir() else "cafile"
    context.load_verify_locations(**{where: ca_bundle})


def _ca_bundle(text: str) -> str:
    try:
        trust(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), text)
    except OSError:  # SSLError is one
        raise ValueError(text) from None
    return text


def _readable(text: str) -> str:
    try:
        with open(text, "rb"):  # noqa: PTH123 as libpq will
            return text
    except OSError:
        raise ValueError(text) from None


def _address(text: str) -> str:
    if "%" in text:  # gunicorn cannot bind to an address with a zone
        raise ValueError(text)
    return str(ip_address(text))


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


TEXT = Kind("text", str)
FILE = Kind("a readable file", _readable)
HOSTS = list_of(Kind("a host", _filled))
SWITCH = one_of({"on": "on", "off": "off"})
DURATION = Kind("a duration such as 500ms, 5s or 1m30s, from 1ms to 24h", parse_duration)
DELAY = Kind("0s or a duration such as 500ms or 5s, up to 24h", _parse_delay)
COUNT = whole_number(1, 1_000_000)
PORT = whole_number(1, 65_535)
PORTS = list_of(PORT)
ADDRESS = Kind("an IP address without brackets, such as 127.0.0.1 or ::1", _address)
LISTEN_PORT = Kind("a port such as 8080 or :8080", lambda text: PORT.parse(text.removeprefix(":")))
CA_BUNDLE = Kind("a readable PEM file, or folder, of certificates", _ca_bundle)
ROOT_CERT = Kind("a readable PEM file of certificates", lambda text: _ca_bundle(_readable(text)))


def secret_text(text: str) -> str:
    """Return `text`.

    Raises:
        ValueError: it is blank, is not UTF-8, or has a NUL, where libpq would cut it.
    """
    if "\0" in text:
        raise ValueError
    text.encode()  # fails if the environment's bytes are not UTF-8
    return _filled(text)


@dataclass(frozen=True, slots=True)
class Secret:
    """The text of a secret, or the file that holds it, which may change while the service runs."""

    text: str = field(default="", repr=False)
    file: str = ""

    def read(self) -> str:
        """Return the secret. A file is read each time, and its last line end is left out.

        Raises:
            ValueError: the file is empty, or not UTF-8 text.
            OSError: the file can't be read.
        """
        if not self.file:
            return self.text
        return secret_text(Path(self.file).read_bytes().decode().rstrip("\r\n"))
