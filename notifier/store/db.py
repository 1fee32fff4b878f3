"""Connections to PostgreSQL: where, as which role, and bounded in time."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg

from notifier.environ import Secret
from notifier.settings import Settings

Connection = psycopg.Connection[tuple[Any, ...]]

# Seconds. The most that a request waits for a host, and libpq's own minimum for connecting.
DATABASE_WAIT = 2.0

# The most that a command waits for an answer: an operator has more patience than a request.
COMMAND_WAIT = 10.0

# How much later than the server we give up: its error says what was slow.
GRACE = 0.5

NO_TABLE = "there is no table notification_preferences: run flask --app notifier.app migrate"

_ENDED = "PostgreSQL ended the connection"
_IS_STANDBY = "the server is a standby"
_LACKS_PRIVILEGE = "the user lacks a privilege: migrate grants it"
_NO_ANSWER = "no answer in time"
_NOT_THERE = "the database, the user or the table does not exist"

# The reasons that log lines give for errors: PostgreSQL's own words name hosts and users. The
# SQLSTATE decides where there is one, as the words come in the server's language (lc_messages).
REASONS_BY_STATE = {
    "25006": _IS_STANDBY,  # read_only_sql_transaction
    "25P03": _ENDED,  # idle_in_transaction_session_timeout
    "3F000": _NOT_THERE,  # invalid_schema_name
    "42501": _LACKS_PRIVILEGE,  # insufficient_privilege
    "42703": _NOT_THERE,  # undefined_column
    "42704": _NOT_THERE,  # undefined_object
    "42883": _NOT_THERE,  # undefined_function
    "42P01": _NOT_THERE,  # undefined_table
    "55P03": _NO_ANSWER,  # lock_not_available
    "57014": _NO_ANSWER,  # query_canceled
    "57P01": _ENDED,  # admin_shutdown
    "57P02": _ENDED,  # crash_shutdown
    "57P04": _ENDED,  # database_dropped
    "57P05": _ENDED,  # idle_session_timeout
}

# Otherwise the first of these texts that the error contains decides. psycopg has no SQLSTATE for a
# connection that fails or breaks, even if the server sent one; pgbouncer has one for everything.
REASONS_BY_TEXT = {
    "through a pooler": "a pooler swallows notifications: set DB_LISTEN_HOST or DB_LISTEN_PORT "
    "past it, or CACHE_INVALIDATION=off",
    "cannot read the password": "password: the file cannot be read",
    # PostgreSQL says the same about a client certificate of another user.
    "password authentication failed": "password, user or DB_SSLCERT: one is wrong",
    "SASL authentication failed": "password or user: one is wrong",  # pgbouncer
    "not permitted to log in": "the user may not log in",
    "SSL encryption": "PostgreSQL admits no such user from here",
    "no encryption": "PostgreSQL admits no such user from here without tls",
    "no pg_hba.conf entry": "PostgreSQL admits no such user from here",
    "requires a valid client certificate": "tls: the server wants a certificate, see DB_SSLCERT",
    "alert unknown ca": "tls: the server does not know the authority of DB_SSLCERT",
    "does not match host name": "tls: the server's certificate is for another host",
    "certificate verify failed": "tls: the server's certificate is expired or of unknown authority",
    "root certificate file": "tls: DB_SSLROOTCERT names no file of authorities",
    "certificate file": "tls: DB_SSLCERT cannot be used",
    "private key file": "tls: DB_SSLKEY cannot be used",
    "server does not support SSL": "tls: the server has none",
    "closed the connection": "the connection broke",
    "closed unexpectedly": "the connection broke",
    "SYSCALL": "the connection broke",
    "SSL": "tls: no secure connection",
    "not currently accepting connections": "PostgreSQL does not accept connections",
    "not accepting connections": "PostgreSQL does not accept connections",
    "not yet accepting connections": "PostgreSQL is starting",
    "is starting up": "PostgreSQL is starting",
    "in recovery mode": "PostgreSQL is starting",
    "is shutting down": "PostgreSQL is stopping",
    "terminating connection": _ENDED,
    "too many": "PostgreSQL has no connection left",
    "remaining connection slots": "PostgreSQL has no connection left",
    "no more connections allowed": "the pooler has no connection left",
    "server login has been failing": "the pooler cannot reach PostgreSQL",
    "in hot standby mode": _IS_STANDBY,
    "does not exist": _NOT_THERE,
    "permission denied": _LACKS_PRIVILEGE,
    "Connection refused": "refused",
    "could not translate host name": "no such host",
    "failed to resolve host": "no such host",
    "No such file or directory": "no socket there",
    "timeout": _NO_ANSWER,
}


class Database:
    """Connects to one place as one role, and keeps no connection.

    By default these are the serving ones. `hosts` is the place in log lines. `wait` is how long a
    request waits for it at most, in seconds: each of several hosts may take `DATABASE_WAIT`.

    Args:
        place: hosts and ports as `Settings` has them.
        role: the name and the password of a user.
        primary: pass standbys over.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        place: tuple[str, str] | None = None,
        role: tuple[str, Secret] | None = None,
        primary: bool = False,
    ) -> None:
        self.username, self._password = role or (settings.db_username, settings.db_password)
        host, port = place or settings.serve_place
        self.hosts = _hosts(host.split(","), port.split(","))
        self.wait = DATABASE_WAIT * len(host.split(","))
        self._parameters: dict[str, Any] = {
            "host": host,
            "port": port,
            "dbname": settings.db_name,
            "user": self.username,
            "sslmode": settings.db_sslmode,
            "sslrootcert": settings.db_sslrootcert,
            "sslcert": settings.db_sslcert,
            "sslkey": settings.db_sslkey,
            "connect_timeout": int(DATABASE_WAIT),
            "client_encoding": "utf8",  # a database in SQL_ASCII would give us bytes
            "application_name": settings.app_name,
            "target_session_attrs": "primary" if primary else "any",
        }

    @classmethod
    def listening(cls, settings: Settings) -> "Database":
        """Return the place for LISTEN: DB_LISTEN_HOST, never a standby."""
        return cls(settings, place=settings.listen_place, primary=True)

    @classmethod
    def reading(cls, settings: Settings) -> "Database":
        """Return the place for reads that tolerate replication lag: DB_READ_HOST."""
        return cls(settings, place=settings.read_place)

    @classmethod
    def migrating(cls, settings: Settings) -> "Database":
        """Return the place of `listening` for the schema's owner, DB_MIGRATION_USERNAME."""
        return cls(
            settings, place=settings.listen_place, role=settings.migrating_role, primary=True
        )

    def connect(self) -> Connection:
        """Return a new connection in autocommit mode; `transaction` and `bounded` limit its use.

        Raises:
            psycopg.Error: PostgreSQL cannot be reached.
        """
        try:
            password = self._password.read()
        except (OSError, ValueError):
            file = self._password.file
            raise psycopg.OperationalError(f"cannot read the password in {file}") from None
        # Prepared statements gain nothing for few queries and break behind transaction poolers.
        connection = psycopg.connect(
            **self._parameters, password=password, autocommit=True, prepare_threshold=None
        )
        # Not the server's default: each statement has to see what was committed before it.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return connection


@contextmanager
def transaction(connection: Connection, seconds: float = DATABASE_WAIT) -> Iterator[None]:
    """Run the block in a transaction that both sides end after `seconds`.

    Raises:
        psycopg.Error: PostgreSQL was too slow, went away, or refused what was asked.
    """
    limit = str(int(1000 * seconds))
    with bounded(connection, seconds + GRACE), connection.transaction():
        # The server has to give up too, as it does not notice that we have. The limit ends with the
        # transaction, after which a pooler lends the session to another client.
        connection.execute("SELECT set_config('statement_timeout', %s, true)", (limit,))
        yield


@contextmanager
def bounded(connection: Connection, seconds: float) -> Iterator[None]:
    """End the connection if the block takes longer than `seconds`.

    A stopped server process never answers, but its kernel still acknowledges. So neither
    `statement_timeout` nor a TCP time-out ends the wait; shutting down the socket does.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        timer = threading.Timer(seconds, _shut_down, (duplicate,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # before the duplicate is closed and its number reused


def _shut_down(duplicate: socket.socket) -> None:
    with suppress(OSError):  # the server closed it first
        duplicate.shutdown(socket.SHUT_RDWR)


def reason(error: BaseException) -> str:
    """Return why PostgreSQL could not be asked, in words that name no host and no user."""
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    if state in REASONS_BY_STATE:
        return REASONS_BY_STATE[state]
    text = str(error)
    return next((ours for theirs, ours in REASONS_BY_TEXT.items() if theirs in text), "unknown")


def log_fields(error: BaseException, host: str) -> dict[str, str]:
    """Return what a log line may say about an error of PostgreSQL.

    Args:
        host: `host_of` the connection, or the `hosts` of a `Database` where there was none.
    """
    return {"error": type(error).__name__, "reason": reason(error), "host": host}


def host_of(connection: Connection) -> str:
    """Return `host:port` of the server at the other end."""
    return _hosts([connection.info.host], [str(connection.info.port)])


def _hosts(hosts: list[str], ports: list[str]) -> str:
    """Return `a:5432,b:5432`; one port is that of all hosts."""
    pairs = zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=True)
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in pairs)


def first_line(error: psycopg.Error) -> str:
    """Return what an operator may read of an error: the lines after the first may quote rows."""
    line = str(error).strip().partition("\n")[0]
    return f"PostgreSQL: {line}"
