"""The settings and the parts of the service, for commands."""

import os
from contextlib import suppress
from typing import Protocol, cast

import click
from flask import current_app

from notifier.attempts import Attempts
from notifier.settings import Settings, SettingsError, settings_or_exit
from notifier.variables import unknown_variables


class Parts(Protocol):
    """The parts of the service that commands use."""

    @property
    def settings(self) -> Settings: ...

    @property
    def attempts(self) -> Attempts: ...


def read_settings() -> Settings | None:
    """Return the settings from the environment; exit with one line if they are invalid.

    While flask only looks for a command, return None instead: flask loads the application even for
    `--help`, which must work in any environment. If the command then runs, `parts` exits.
    """
    context = click.get_current_context(silent=True)
    if context is not None:  # in a worker there is none, and gunicorn's master has warned
        _warn_of_unknown_variables()
    if context is None or not isinstance(context.command, click.Group):
        return settings_or_exit()
    with suppress(SettingsError):
        return Settings.from_env(os.environ)
    return None


def _warn_of_unknown_variables() -> None:
    unknown = unknown_variables(os.environ, Settings.variables()).items()
    if unknown:
        names = ", ".join(f"{name} (did you mean {nearest}?)" for name, nearest in unknown)
        click.echo(f"warning: unknown variables have no effect: {names}", err=True)


def parts() -> Parts:
    """Return the parts of the app; exit if it has none because the settings are invalid."""
    if "notifier" not in current_app.extensions:
        settings_or_exit()
    return cast("Parts", current_app.extensions["notifier"])
