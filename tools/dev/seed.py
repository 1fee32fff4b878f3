"""The mock providers, and their rows for a database that has none.

`python -m tools.dev.seed HOST`, with the DB_* in the environment, adds the rows of mock
providers that listen on HOST. It imports what the service has anyway: it runs in its image.
"""

import argparse
import os
import secrets
import sys
from collections.abc import Iterable
from typing import NamedTuple

import psycopg

from notifier.models import Channel
from notifier.settings import Settings, SettingsError
from notifier.store.db import Database, first_line


class Mock(NamedTuple):
    """A mock provider and its row."""

    name: str
    channel: Channel
    port: int
    priority: int

    def url(self, host: str) -> str:
        """Return where it is when it listens on `host`."""
        return f"http://{host}:{self.port}/"


PROVIDERS = (
    Mock("email 1", Channel.EMAIL, 9090, 0),
    Mock("email 2", Channel.EMAIL, 9091, 1),
    Mock("push 1", Channel.PUSH, 9092, 0),
    Mock("push 2", Channel.PUSH, 9093, 1),
)


def add_rows(database: Database, providers: Iterable[Mock], host: str) -> bool:
    """Add the rows of `providers`, which listen on `host`, if the table is empty; say whether.

    Raises:
        psycopg.Error: PostgreSQL cannot be reached or refused.
    """
    with database.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE notification_preferences IN EXCLUSIVE MODE")
        if connection.execute("SELECT 1 FROM notification_preferences LIMIT 1").fetchone():
            return False
        connection.cursor().executemany(
            "INSERT INTO notification_preferences"
            " (provider_type, provider_name, host, priority, secret_key)"
            " VALUES (%s, %s, %s, %s, %s)",
            [
                (mock.channel, mock.name, mock.url(host), mock.priority, secrets.token_hex(8))
                for mock in providers
            ],
        )
    return True


def main() -> int:
    """Add the rows; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.dev.seed")
    parser.add_argument("host", metavar="HOST", help="where the mock providers listen")
    host = parser.parse_args().host
    try:
        database = Database.migrating(Settings.from_env(os.environ))
        added = add_rows(database, PROVIDERS, host)
    except SettingsError as error:
        print(f"seed: {error}", file=sys.stderr)
    except psycopg.Error as error:
        print(f"seed: {first_line(error)}", file=sys.stderr)
    else:
        print("added the mock providers" if added else "there are providers already")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
