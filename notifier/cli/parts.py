"""The settings and the parts of the service, as commands get at them."""

import os
from contextlib import suppress
from typing import Protocol, cast

import click
from flask import current_app

from notifier.attempts import Attempts
from notifier.settings import Settings, SettingsError, settings_or_exit


class Parts(Protocol):
    """The parts of the service that commands use."""

    @property
    def settings(self) -> Settings: ...

    @property
    def attempts(self) -> Attempts: ...


def read_settings() -> Settings | None:
    """Return the settings of the environment; end the process with one line if they are unusable.

    Return None instead while flask only looks for a command: it loads the application even to show
    `--help`, which works in any environment. `parts` ends the process if the command then runs.
    """
    if not _is_looking_for_command():
        return settings_or_exit()
    with suppress(SettingsError):
        return Settings.from_env(os.environ)
    return None


def _is_looking_for_command() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and isinstance(context.command, click.Group)


def parts() -> Parts:
    """Return the parts of the app; without settings it has none, and the process ends."""
    if "notifier" not in current_app.extensions:
        settings_or_exit()
    return cast("Parts", current_app.extensions["notifier"])
