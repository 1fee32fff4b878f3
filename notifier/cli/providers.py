"""The commands `flask --app notifier.app providers COMMAND`."""

import json
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any, cast

import click
from flask.cli import AppGroup

from notifier import logs
from notifier.attempts import Attempts
from notifier.cli import secret
from notifier.cli.explained import explained
from notifier.cli.parts import parts
from notifier.cli.tables import table
from notifier.errors import AttemptFailed, AttemptOutcome
from notifier.models import Channel, Message, Provider
from notifier.store import catalogue
from notifier.store.catalogue import Entry
from notifier.store.db import Database
from notifier.store.values import Values

# The domain is reserved (RFC 2606, section 3), so nobody receives the message.
NOBODY = "notifier-test@example.com"

Command = Callable[..., None]


providers = AppGroup(
    "providers",
    short_help="List, add, edit, remove, restore and test providers.",
    help="""List, add, edit, remove, restore and test providers.

    Each provider is a row of notification_preferences. Running services notice changes by
    themselves.

    The commands connect as DB_MIGRATION_USERNAME or, if that is unset, as DB_USERNAME. The role
    needs SELECT to list and test, and also INSERT and UPDATE to make changes.

    \b
    Exit codes: 0 done
                1 refused or failed
                2 the command line could not be understood""",
    epilog="""Examples:

    \b
      flask --app notifier.app providers list
      flask --app notifier.app providers add --help""",
)


def _channel_option(text: str, *, required: bool = False) -> Callable[[Command], Command]:
    def full_name(_: click.Context, __: click.Parameter, given: str | None) -> str | None:
        return Channel.PUSH.value if given == "push" else given

    return click.option(
        "--channel",
        "provider_type",
        type=click.Choice([*(channel.value for channel in Channel), "push"], case_sensitive=False),
        metavar="CHANNEL",
        callback=full_name,
        required=required,
        help=text,
    )


_entry_id = click.argument("entry_id", metavar="ID", type=int)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _values_options(*, required: bool) -> Callable[[Command], Command]:
    options: list[Callable[[Command], Command]] = [
        _channel_option("Email or PushNotification.", required=required),
        click.option("--name", "provider_name", required=required, help="The provider's name."),
        click.option("--host", metavar="URL", required=required, help="The provider's URL."),
        click.option("--priority", type=int, help="The lowest is tried first. A new row has 0."),
        click.option(
            "--secret-prompt", is_flag=True, help="Ask twice for a secret of one line, unseen."
        ),
        click.option("--secret-stdin", is_flag=True, help="Read the secret from standard input."),
        click.option(
            "--secret-file",
            metavar="PATH",
            help="Read the secret from a file.",
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@providers.command(
    "list",
    help="""List the providers.

    They are sorted by channel. Active providers come first, in the order they are tried.""",
    epilog="""Examples:

    \b
      flask --app notifier.app providers list
      flask --app notifier.app providers list --active --channel email
      flask --app notifier.app providers list --json | jq '.[] | select(.has_secret | not)'""",
)
@click.option("--active", is_flag=True, help="Leave out removed providers.")
@_channel_option("Only this channel: Email or PushNotification.")
@_as_json
@explained()
def _list(*, active: bool, provider_type: str | None, as_json: bool) -> None:
    found = catalogue.entries(_database(), channel=provider_type, active=active)
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=2))
    elif found:
        click.echo(table(map(_shown, found)))
    else:
        click.echo("no providers", err=True)


@providers.command(
    "add",
    help="""Add a provider, and show its row.

    Without a --secret option the provider has no secret. A line end after the secret is dropped.
    The command fails if an active provider has the same channel and URL.""",
    epilog="""Examples:

    \b
      flask --app notifier.app providers add --channel email --name 'Acme Mail' \\
          --host https://mail.acme.example/v1/send --secret-prompt
      flask --app notifier.app providers add --channel push --name 'Acme Push' \\
          --host https://push.acme.example/v1/send --priority 1 --secret-stdin < acme.key""",
)
@_values_options(required=True)
@_as_json
@explained()
def _add(*, as_json: bool, **given: Any) -> None:
    _show(catalogue.add(_database(), _values(given)), as_json=as_json)


@providers.command(
    "edit",
    help="""Change the given values of a provider, and show its row.""",
    epilog="""Examples:

    \b
      flask --app notifier.app providers edit 3 --priority -1
      flask --app notifier.app providers edit 3 --secret-file /run/secrets/acme
      flask --app notifier.app providers edit 3 --name 'Acme Mail' --no-secret""",
)
@_entry_id
@_values_options(required=False)
@click.option("--no-secret", is_flag=True, help="Remove the secret.")
@_as_json
@explained()
def _edit(*, entry_id: int, as_json: bool, **given: Any) -> None:
    _show(catalogue.edit(_database(), entry_id, _values(given)), as_json=as_json)


@providers.command(
    "remove",
    help="""Stop using a provider, and show its row.

    The row stays and can be restored.""",
    epilog="""Example:

    \b
      flask --app notifier.app providers remove 3""",
)
@_entry_id
@_as_json
@explained()
def _remove(*, entry_id: int, as_json: bool) -> None:
    _show(catalogue.remove(_database(), entry_id), as_json=as_json)


@providers.command(
    "restore",
    help="""Use a removed provider again, and show its row.""",
    epilog="""Example:

    \b
      flask --app notifier.app providers restore 3""",
)
@_entry_id
@_as_json
@explained()
def _restore(*, entry_id: int, as_json: bool) -> None:
    _show(catalogue.restore(_database(), entry_id), as_json=as_json)


@providers.command(
    "test",
    help="""Send a real message to one provider, and show the outcome.

    The request, its timeout and its proxy are the service's own. Circuit breakers are ignored, and
    a removed provider can be tested too. The outcome is accepted, not_sent, unknown (the provider
    may have the message), rejected or skipped (its URL cannot be called). Only accepted exits with
    0. Without a status from the provider, error names the step that failed, and detail gives the
    system's message.""",
    epilog="""Examples:

    \b
      flask --app notifier.app providers test 3
      flask --app notifier.app providers test 3 --to me@example.com --json""",
)
@_entry_id
@click.option("--to", default=NOBODY, show_default=True, help="Email address of the recipient.")
@_as_json
@click.pass_context
@explained()
def _test(context: click.Context, *, entry_id: int, to: str, as_json: bool) -> None:
    if "@" not in to or not to.isprintable():
        raise click.BadParameter("expected an email address", param_hint="--to")
    entry, provider = catalogue.provider(_database(), entry_id)
    message = Message(to, "Test", "This is a test of the notifier. No action is needed.")
    with closing(parts().attempts) as sender:
        result = _sent(sender, provider, message)
    shown = {name: getattr(entry, name) for name in ("id", "channel", "name", "host", "state")}
    shown |= result
    click.echo(json.dumps(shown, indent=2) if as_json else table([shown]))
    if result["outcome"] != AttemptOutcome.ACCEPTED:
        context.exit(1)


def _sent(sender: Attempts, provider: Provider, message: Message) -> dict[str, Any]:
    """Make one attempt with a new request id; return its outcome."""
    outcome, status, error, detail = AttemptOutcome.ACCEPTED, None, None, None
    request_id = uuid.uuid4().hex
    token = logs.request_id.set(request_id)
    began = time.monotonic()
    try:
        status = sender.send_unguarded(provider, message)
    except AttemptFailed as failure:
        outcome, status, detail = failure.outcome, failure.status, failure.detail
        error = failure.reason if status is None else None
    finally:
        logs.request_id.reset(token)
    return {
        "outcome": outcome,
        "status": status,
        "error": error,
        "detail": detail,
        "duration_ms": round(1000 * (time.monotonic() - began), 1),
        "request_id": request_id,
    }


def _database() -> Database:
    return Database.migrating(parts().settings)


def _values(given: dict[str, Any]) -> Values:
    """Return the values of the given options by column."""
    sources = [source for source in secret.OPTIONS if given.get(source) not in (None, False)]
    if len(sources) > 1:
        options = " and ".join(f"--{source.replace('_', '-')}" for source in sources)
        raise click.UsageError(f"{options} cannot be combined")
    values = {
        name: value
        for name, value in given.items()
        if name not in secret.OPTIONS and value is not None
    }
    if sources:
        values["secret_key"] = secret.read(given)
    return cast("Values", values)


def _show(entry: Entry, *, as_json: bool) -> None:
    click.echo(json.dumps(asdict(entry), indent=2) if as_json else table([_shown(entry)]))


def _shown(entry: Entry) -> dict[str, Any]:
    problem = entry.problem and f"skipped ({entry.problem})"
    return {
        "id": entry.id,
        "channel": entry.channel,
        "name": entry.name,
        "host": entry.host,
        "priority": entry.priority,
        "secret": "set" if entry.has_secret else "not set",
        "created": entry.created_at,
        "state": " ".join(filter(None, (entry.state, entry.deleted_at, problem))),
    }
