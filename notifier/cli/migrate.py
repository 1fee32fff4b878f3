"""The commands `flask --app notifier.app migrate` and `rollback`."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import click
from flask.cli import with_appcontext

from notifier.cli.explained import explained
from notifier.cli.parts import parts
from notifier.errors import Refused
from notifier.settings import Settings
from notifier.store import migrations
from notifier.store.roles import NotGranted

Result = TypeVar("Result")


@click.command("migrate", help="Bring the database's schema and the service's role up to date.")
@with_appcontext
def migrate() -> None:
    migrated = _with_database(partial(migrations.migrate, report=_applied))
    if not migrated.applied:
        click.echo("nothing to apply, the schema is up to date")
    for notice in migrated.notices:
        click.echo(notice)


def _applied(name: str) -> None:
    click.echo(f"applied {name}")


@click.command("rollback", help="Undo the last migration.")
@with_appcontext
def rollback() -> None:
    name = _with_database(migrations.rollback)
    click.echo(f"rolled back {name}" if name else "nothing to roll back")


@explained()
def _with_database(act: Callable[[Settings], Result]) -> Result:
    try:
        return act(parts().settings)
    except NotGranted as error:
        raise Refused(f"the schema is up to date, but {error}") from None
