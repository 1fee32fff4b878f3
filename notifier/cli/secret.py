"""Reads a provider's secret: from a prompt, standard input or a file, never from an argument."""

import os
import re
import select
import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from notifier.store.values import MAX_SECRET

# The options that name its source; they exclude each other.
OPTIONS = ("secret_prompt", "secret_stdin", "secret_file", "no_secret")

_NO_TEXT = "the secret is no text in UTF-8"
_OTHERWISE = "use --secret-file or --secret-stdin"

# Bytes of a line, its end not counted, that a terminal passes on. It drops the rest silently, so a
# line of this length may have been cut.
_LONGEST_LINE = 4095 if sys.platform == "linux" else 1023

# An escape is among them: some terminals put one around what is pasted, and cursor keys send one.
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

# Seconds without input after which a paste is over.
_QUIET = 0.2


def read(given: Mapping[str, Any]) -> str | None:
    """Return the secret from the source that the options name; None if there is to be none."""
    if given["secret_prompt"]:
        return _prompted()
    if given["secret_stdin"]:
        if sys.stdin.isatty():
            raise click.UsageError("standard input is a terminal: use --secret-prompt")
        return _read(sys.stdin.buffer)
    if given["secret_file"] is not None:
        try:
            with Path(given["secret_file"]).open("rb") as file:
                return _read(file)
        except OSError as error:
            # The line leaves out the file's name: it may be the secret, given by mistake.
            raise click.ClickException(f"--secret-file cannot be read: {error.strerror}") from None
    return None


def _prompted() -> str:
    """Return a secret of one line that was entered twice, unseen.

    If several lines are pasted, the second prompt gets the second of them, however late it comes:
    nothing is discarded between the prompts, and no prompt is repeated.
    """
    if not sys.stdin.isatty():
        raise click.UsageError("--secret-prompt needs a terminal: use --secret-stdin")
    terminal = sys.stdin.fileno()
    with _hidden(terminal):
        entry = _entry(terminal, "Secret: ")
        again = _entry(terminal, "Repeat for confirmation: ")
        more = _discard(terminal)
    if more or entry != again:
        raise click.ClickException(
            "the two entries differ, or more than two lines came: nothing is stored."
            f" For a secret of several lines {_OTHERWISE}"
        )
    if len(entry) >= _LONGEST_LINE or _CONTROL.search(entry):
        raise click.ClickException(
            "the secret is too long for a terminal, or holds control characters: nothing is"
            f" stored. Instead {_OTHERWISE}"
        )
    return _decoded(entry)


@contextmanager
def _hidden(terminal: int) -> Iterator[None]:
    """Echo nothing during the block; discard input that came before it, or is left after it."""
    before, hidden = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    hidden[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSAFLUSH, hidden)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _entry(terminal: int, prompt: str) -> bytes:
    """Return the next line, without its end: a terminal gives one line to each read."""
    click.echo(prompt, nl=False, err=True)
    line = os.read(terminal, _LONGEST_LINE + 1)
    click.echo(err=True)
    if not line:  # an end of file
        raise click.Abort
    return line.removesuffix(b"\n")


def _discard(terminal: int) -> bool:
    """Discard input, or a shell would take the rest of a paste for commands; return if any came."""
    modes = termios.tcgetattr(terminal)
    modes[3] &= ~termios.ICANON  # so that an unfinished line can be read
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    found = False
    while select.select([terminal], [], [], _QUIET)[0] and os.read(terminal, 4096):
        found = True
    return found


def _read(source: BinaryIO) -> str:
    """Return the text without its last line end, and read little more than `MAX_SECRET`."""
    text = _decoded(source.read(4 * MAX_SECRET + 2))
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise click.ClickException(_NO_TEXT) from None
