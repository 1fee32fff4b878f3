"""The output of `make run`: in order, complete, and never an obstacle to a stop."""

import json
import os
import pty
import select
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import pytest

from tests.timing import eventually, within
from tools.dev import output
from tools.dev.output import Log, Output
from tools.dev.readable import Entry

ENTRY = {"timestamp": "2026-11-28T11:48:00.123Z", "level": "INFO", "message": "listening"}
JSON = json.dumps(ENTRY).encode() + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], int]]:
    """The end to read, and the descriptor to write to."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        yield source, writing
    with suppress(OSError):  # the test closed it
        os.close(writing)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The descriptors of a terminal's two ends: ours and the program's."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    for descriptor in (ours, theirs):
        with suppress(OSError):
            os.close(descriptor)


def relayed(lines: bytes, target: int, heard: list[Entry]) -> None:
    """Let a log of `lines` go to the descriptor, to the end."""
    reading, writing = os.pipe()
    shown = Output(target)
    with os.fdopen(reading, "rb") as source:
        log = Log(shown, heard.append)
        log.follow(source)
        with os.fdopen(writing, "wb") as service:
            service.write(lines)
        log.wait()
    shown.close()


def read_lines(terminal: int, count: int) -> list[bytes]:
    """Read from our end of a terminal until `count` lines have come."""
    shown = b""
    while shown.count(b"\n") < count:
        assert select.select([terminal], [], [], 10)[0], shown
        shown += os.read(terminal, 10_000)
    return shown.splitlines()


def test_a_pipe_gets_the_services_own_bytes(pipe: tuple[IO[bytes], int]) -> None:
    source, writing = pipe
    lines = JSON + b"Traceback\xff\n" + JSON + b"no line end"
    heard: list[Entry] = []
    relayed(lines, writing, heard)
    os.close(writing)
    assert source.read() == lines
    assert heard == [ENTRY, ENTRY]


@pytest.mark.parametrize(
    "odd",
    [
        json.dumps(ENTRY | {"message": "request", "status": 200, "channels": 7}),
        json.dumps(ENTRY | {"message": "request", "status": 200, "channels": ["x"]}),
        "[" * 50_000,
    ],
    ids=["number", "text", "deep"],
)
def test_an_entry_of_an_unknown_form_passes_as_it_is_and_the_log_goes_on(
    terminal: tuple[int, int], odd: str
) -> None:
    ours, theirs = terminal
    relayed(odd.encode() + b"\n" + JSON, theirs, [])
    shown = read_lines(ours, 2)
    assert shown[0] == odd.encode()
    assert shown[1].endswith(b" listening")


def test_a_terminal_gets_readable_lines_and_all_others_as_they_are(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    heard: list[Entry] = []
    relayed(JSON + b"Traceback\n", terminal[1], heard)
    first, second = (line.decode() for line in read_lines(terminal[0], 2))
    assert first.endswith(" INFO    listening")
    assert second == "Traceback"
    assert heard == [ENTRY]


@pytest.mark.parametrize(
    ("variables", "colour"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_a_terminal_has_colour_unless_the_environment_says_otherwise(
    terminal: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    colour: bool,
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    relayed(JSON, terminal[1], [])
    assert (b"\033[" in os.read(terminal[0], 1000)) is colour


def test_a_pipe_has_no_colour(pipe: tuple[IO[bytes], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = Output(pipe[1])
    assert not shown.colour
    shown.close()


def test_a_paused_terminal_delays_neither_the_log_nor_the_stop(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.2)
    heard: list[Entry] = []
    with within(10):
        relayed(JSON * 20_000, terminal[1], heard)  # nobody reads what the terminal shows
    assert len(heard) == 20_000


def test_a_slow_terminal_gets_everything_before_the_end(
    pipe: tuple[IO[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, writing = pipe
    write = os.write

    def slowly(descriptor: int, data: bytes) -> int:
        time.sleep(0.001 if descriptor == writing else 0)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slowly)
    shown = Output(writing)
    for number in range(500):
        shown.say(str(number))
    shown.close()
    os.close(writing)
    assert source.read().split() == [str(number).encode() for number in range(500)]


def test_after_a_pause_the_newest_lines_are_shown_and_the_others_counted(
    pipe: tuple[IO[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MOST_WAITING", 10)
    source, writing = pipe
    shown = Output(writing)
    shown.say("x" * 100_000)  # more than a pipe holds: from here on it is paused
    eventually(lambda: not shown._waiting)
    for number in range(100):
        shown.say(str(number))
    assert source.readline() == b"x" * 100_000 + b"\n"
    shown.close()
    os.close(writing)
    first, *others = source.read().decode().splitlines()
    assert first == "(90 lines left out: the terminal was too slow)"
    assert others == [str(number) for number in range(90, 100)]


def test_a_terminal_that_is_gone_loses_the_lines_and_nothing_else(
    pipe: tuple[IO[bytes], int],
) -> None:
    source, writing = pipe
    source.close()
    heard: list[Entry] = []
    relayed(JSON * 3, writing, heard)
    assert len(heard) == 3
