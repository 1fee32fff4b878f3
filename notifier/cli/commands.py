"""Registers the commands with flask: `flask --app notifier.app COMMAND`."""

import click
from flask import Flask
from flask.cli import AppGroup


class _Commands(AppGroup):
    """Imports the commands when flask looks for one: gunicorn's workers never need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._import()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._import()
        return super().get_command(ctx, cmd_name)

    def _import(self) -> None:
        from notifier.cli import check_role, migrate, providers  # noqa: PLC0415 see above

        self.add_command(migrate.migrate)
        self.add_command(migrate.rollback)
        self.add_command(check_role.check_role)
        self.add_command(providers.providers)


def register(app: Flask) -> None:
    """Add the commands to `app`."""
    app.cli = _Commands(app.name)
