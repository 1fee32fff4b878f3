"""How a command ends that cannot do what it was asked to: with one line and exit code 1."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import psycopg

from notifier.errors import Refused


@contextmanager
def explained() -> Iterator[None]:
    """Turn what refuses and what PostgreSQL says into click's error, its details left out."""
    try:
        yield
    except Refused as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        # The lines after the first may quote rows, secrets included.
        first_line = str(error).strip().partition("\n")[0]
        raise click.ClickException(f"PostgreSQL: {first_line}") from None
