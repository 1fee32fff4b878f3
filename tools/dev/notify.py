"""`./notify`: the service's commands in development.

They use the database of DB_* when DB_HOST is set. Otherwise they use that of `make run`, and start
its server if need be.
"""

import os
import signal
import sys
from contextlib import closing, nullcontext
from typing import Any

import click
from flask.cli import FlaskGroup

from notifier.app import create_app
from tools.dev import postgres
from tools.dev.postgres import PostgresError

_IN_PRODUCTION, _HERE = "flask --app notifier.app", "./notify"


class _Help(click.HelpFormatter):
    """Help whose examples name the command as the user typed it."""

    def write(self, string: str) -> None:
        super().write(string.replace(_IN_PRODUCTION, _HERE))


class _Commands(FlaskGroup):
    """Commands whose errors name the command as the user typed it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError:
            raise
        except click.ClickException as error:
            message = error.format_message().replace(_IN_PRODUCTION, _HERE)
            raise click.ClickException(message) from None


commands = _Commands(
    create_app=create_app,
    add_default_commands=False,
    add_version_option=False,
    load_dotenv=False,
    help="Change the notifier's providers, and bring its database up to date.",
)
commands.params.clear()  # flask's own, such as --app


def _joined() -> postgres.Server | None:
    """Let DB_* name the database, and return the share in its server if it is ours."""
    if ignored := postgres.ignored(os.environ):
        print(f"notify: {ignored}", file=sys.stderr)
    os.environ |= postgres.unproxied(os.environ)
    return postgres.join()


def main() -> None:
    """Run the command, and end the process with its exit code. Help needs no database."""
    click.Context.formatter_class = _Help
    try:
        is_help = "--help" in sys.argv or not sys.argv[1:]
        share = None if is_help else _joined()
    except PostgresError as error:
        sys.exit(f"notify: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    with closing(share) if share else nullcontext():
        commands.main(prog_name=_HERE)


if __name__ == "__main__":
    main()
