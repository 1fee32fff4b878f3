"""The mock providers and their rows in the database.

`python -m tools.dev.seed HOST`, with the DB_* in the environment, adds the rows of mock
providers that listen on HOST. The service's image has all that it imports: it runs there.
"""

import argparse
import os
import re
import secrets
import sys
from collections.abc import Iterable
from typing import NamedTuple

import psycopg

from notifier.models import Channel
from notifier.settings import Settings, SettingsError
from notifier.store.db import Database, first_line

# Finds rows by their provider's name, its channel and a URL without its port. The ports must follow
# each other as those of the mock providers do, in most of the rows: a user edited the others.
_MOVE = """
WITH ours AS (
    SELECT row.id, mock.name, mock.url,
           substring(row.host FROM %(made)s)::int - mock.number AS first
      FROM unnest(%(channels)s::text[], %(names)s::text[], %(urls)s::text[])
           WITH ORDINALITY AS mock (channel, name, url, number)
      JOIN notification_preferences AS row
        ON row.provider_type::text = mock.channel AND row.provider_name = mock.name
     WHERE row.host ~ %(made)s
)
UPDATE notification_preferences AS row
   SET host = ours.url
  FROM ours
 WHERE row.id = ours.id AND row.host <> ours.url
   AND ours.first = (
        SELECT first FROM ours GROUP BY first
        HAVING count(*) > 1 AND 2 * count(*) > (SELECT count(*) FROM ours)
   )
RETURNING ours.name
"""


class Mock(NamedTuple):
    """A mock provider and its row."""

    name: str
    channel: Channel
    port: int
    priority: int

    def url(self, host: str) -> str:
        """Return its URL when it listens on `host`."""
        return f"http://{host}:{self.port}/"


PROVIDERS = (
    Mock("email 1", Channel.EMAIL, 9090, 0),
    Mock("email 2", Channel.EMAIL, 9091, 1),
    Mock("push 1", Channel.PUSH, 9092, 0),
    Mock("push 2", Channel.PUSH, 9093, 1),
)


def from_port(first: int) -> tuple[Mock, ...]:
    """Return the mock providers with `first` and the ports after it."""
    return tuple(mock._replace(port=port) for port, mock in enumerate(PROVIDERS, first))


def add_rows(database: Database, providers: Iterable[Mock], host: str) -> bool:
    """Add the rows of `providers`, which listen on `host`; return False if the table has rows.

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


def move_rows(database: Database, providers: Iterable[Mock], host: str) -> list[str]:
    """Point the rows of `providers` to their present ports; return the names of the moved ones.

    A row moves only if `add_rows` evidently made it: it has the name and the channel of a mock
    provider, and its port on `host` fits those of most other such rows. Rows that a user added or
    edited stay.

    Raises:
        psycopg.Error: PostgreSQL cannot be reached or refused.
    """
    mocks = tuple(providers)
    values = {
        "channels": [str(mock.channel) for mock in mocks],
        "names": [mock.name for mock in mocks],
        "urls": [mock.url(host) for mock in mocks],
        "made": rf"^http://{re.escape(host)}:([0-9]{{1,5}})/$",
    }
    with database.connect() as connection:
        return sorted({name for (name,) in connection.execute(_MOVE, values)})


def has_rows(database: Database, providers: Iterable[Mock], host: str) -> bool:
    """Return True if at least one row points to one of `providers`.

    Raises:
        psycopg.Error: PostgreSQL cannot be reached or refused.
    """
    urls = [mock.url(host) for mock in providers]
    query = "SELECT 1 FROM notification_preferences WHERE host = ANY(%s) LIMIT 1"
    with database.connect() as connection:
        return connection.execute(query, [urls]).fetchone() is not None


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
