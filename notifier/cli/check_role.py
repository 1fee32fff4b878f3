"""The command `flask --app notifier.app check-role`."""

import click
from flask.cli import with_appcontext

from notifier.cli.explained import explained
from notifier.cli.parts import parts
from notifier.store import role_check


@click.command(
    "check-role",
    short_help="Check that the service's role can do what it needs, and no more.",
    help="""Check that the service's role can do what it needs, and no more.

    The role is DB_USERNAME. It should be able to read the providers and do nothing else. Each line
    of output names a problem and its remedy. The command changes nothing. It connects as
    DB_MIGRATION_USERNAME or, if that is unset, as DB_USERNAME.

    \b
    Exit codes: 0 the role can do what it needs, and no more
                1 it cannot serve, can do more, or could not be checked
                2 the command line could not be understood""",
)
@click.pass_context
@with_appcontext
@explained()
def check_role(context: click.Context) -> None:
    settings = parts().settings
    findings = role_check.check(settings)
    for line in findings:
        click.echo(line)
    if findings:
        context.exit(1)
    click.echo(f"role {settings.db_username} can read the providers and do nothing else")
