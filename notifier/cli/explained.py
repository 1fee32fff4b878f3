"""How a command ends that cannot do what it was asked to: with one line and exit code 1."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import psycopg

from notifier.errors import Refused
from notifier.store.db import first_line


@contextmanager
def explained() -> Iterator[None]:
    """Turn what refuses and what PostgreSQL says into click's error, its details left out."""
    try:
        yield
    except Refused as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        raise click.ClickException(first_line(error)) from None
