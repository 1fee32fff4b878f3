"""How PostgreSQL is reached: one short-lived connection per use, bounded in time."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, LiteralString

import psycopg

from notifier.settings import Settings

# The most that a request waits for PostgreSQL. libpq's own minimum for connecting is 2 s as well.
DATABASE_WAIT = 2.0


class Database:
    """Connects with the service's settings. Holds no connection between uses."""

    def __init__(self, settings: Settings) -> None:
        self._parameters: dict[str, Any] = {
            "host": settings.db_host,
            "port": settings.db_port,
            "dbname": settings.db_name,
            "user": settings.db_username,
            "password": settings.db_password,
            "sslmode": settings.db_sslmode,
            "connect_timeout": int(DATABASE_WAIT),
            "client_encoding": "utf8",  # whatever the database's: SQL_ASCII would give us bytes
            "application_name": settings.app_name,
        }

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a new connection in autocommit mode, without a time limit on what is done with it.

        Raises:
            psycopg.Error: PostgreSQL cannot be reached.
        """
        # Prepared statements gain nothing on short connections and break transaction poolers.
        return psycopg.connect(**self._parameters, autocommit=True, prepare_threshold=None)

    def fetch(self, query: LiteralString, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return the rows of `query`, within `DATABASE_WAIT` seconds once connected.

        Raises:
            psycopg.Error: PostgreSQL cannot be reached, is too slow, or refused the query.
        """
        limit = str(int(1000 * DATABASE_WAIT))
        with (
            self.connect() as connection,
            _cut_off(connection, DATABASE_WAIT),
            connection.transaction(),
        ):
            # The server must give up too, it does not notice that we have left; but only for this
            # transaction, because a transaction pooler hands the session on.
            connection.execute("SELECT set_config('statement_timeout', %s, true)", (limit,))
            return connection.execute(query, parameters).fetchall()


@contextmanager
def _cut_off(connection: psycopg.Connection[Any], seconds: float) -> Iterator[None]:
    """End what the block waits for after `seconds`.

    A stopped server process answers nothing and its kernel still acknowledges, so neither
    `statement_timeout` nor TCP time-outs end the wait; shutting the socket down does.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        timer = threading.Timer(seconds, _shut_down, (duplicate,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # before the duplicate is closed and its number used by something else


def _shut_down(duplicate: socket.socket) -> None:
    with suppress(OSError):  # the server closed it first
        duplicate.shutdown(socket.SHUT_RDWR)
