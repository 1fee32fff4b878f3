"""How operators act: `flask --app notifier.app COMMAND`."""

from collections.abc import Callable
from typing import TypeVar

import click
import psycopg
from flask import Flask, current_app
from flask.cli import with_appcontext

from notifier import schema
from notifier.roles import NotGranted
from notifier.settings import Settings

Result = TypeVar("Result")


def register(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli.add_command(_migrate)
    app.cli.add_command(_rollback)


@click.command("migrate", help="Bring the database's schema and the service's role up to date.")
@with_appcontext
def _migrate() -> None:
    migrated = _with_database(schema.migrate)
    for name in migrated.applied:
        click.echo(f"applied {name}")
    if not migrated.applied:
        click.echo("nothing to apply, the schema is up to date")
    for notice in migrated.notices:
        click.echo(notice)


@click.command("rollback", help="Undo the last migration.")
@with_appcontext
def _rollback() -> None:
    name = _with_database(schema.rollback)
    click.echo(f"undid {name}" if name else "nothing to undo")


def _with_database(act: Callable[[Settings], Result]) -> Result:
    try:
        return act(current_app.extensions["notifier"].settings)
    except psycopg.errors.LockNotAvailable:
        raise click.ClickException(
            f"another migration has been running for {schema.LOCK_WAIT}; try again when it is done"
        ) from None
    except NotGranted as error:
        raise click.ClickException(f"the schema is up to date, but {error}") from None
    except psycopg.Error as error:
        first_line = str(error).strip().partition("\n")[0]
        raise click.ClickException(f"PostgreSQL: {first_line}") from None
