"""Reads a provider's secret: from a prompt, standard input or a file, never from an argument."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import click

from notifier.store.values import MAX_SECRET

# The options that name its source; they exclude each other.
OPTIONS = ("secret_prompt", "secret_stdin", "secret_file", "no_secret")

_NO_TEXT = "the secret is no text in UTF-8"


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
    if not sys.stdin.isatty():
        raise click.UsageError("--secret-prompt needs a terminal: use --secret-stdin")
    try:
        return str(click.prompt("Secret", hide_input=True, confirmation_prompt=True, err=True))
    except UnicodeDecodeError:
        raise click.ClickException(_NO_TEXT) from None


def _read(source: BinaryIO) -> str:
    """Return the text without its last line end, and read little more than `MAX_SECRET`."""
    data = source.read(4 * MAX_SECRET + 2)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise click.ClickException(_NO_TEXT) from None
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text
