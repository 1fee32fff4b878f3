"""Errors that end a command with one line and exit code 1."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import psycopg

from notifier.errors import Refused
from notifier.store.db import first_line


@contextmanager
def explained() -> Iterator[None]:
    """Turn refusals and PostgreSQL's errors into click's, without their details."""
    try:
        yield
    except Refused as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        raise click.ClickException(first_line(error)) from None
