"""Ends a command with one line and exit code 1 if an expected error occurs."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import psycopg

from notifier.errors import Refused
from notifier.store.db import first_line


@contextmanager
def explained() -> Iterator[None]:
    """Convert `Refused` and PostgreSQL's errors to click's, without PostgreSQL's details."""
    try:
        yield
    except Refused as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        raise click.ClickException(first_line(error)) from None
