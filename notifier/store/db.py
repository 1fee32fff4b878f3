"""Connections to PostgreSQL: to which place, as which role, and within which time."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader

from notifier.environ import Secret
from notifier.settings import Settings
from notifier.single_flight import start
from notifier.variables import withdraw

Connection = psycopg.Connection[tuple[Any, ...]]

# Maximum seconds that a request waits for one host; also libpq's minimum for connecting.
DATABASE_WAIT = 2.0

# Maximum seconds that an operator's command waits for an answer.
COMMAND_WAIT = 10.0

# Extra seconds to wait, so that the server's more exact error arrives first.
GRACE = 0.5

# A path that cannot exist. For a file that is unset, libpq would look in ~/.postgresql.
NO_FILE = "/dev/null/none"

NO_TABLE = "there is no table notification_preferences: run flask --app notifier.app migrate"

# PostgreSQL's types of texts.
_TEXTS = ("text", "varchar", "bpchar", "name")

# The settings of a transaction. Python lacks codecs for two encodings: there the server converts.
_BEGIN = """
    SELECT set_config('statement_timeout', %s, true),
           set_config('client_encoding',
                      CASE WHEN getdatabaseencoding() IN ('EUC_TW', 'MULE_INTERNAL') THEN 'UTF8'
                           ELSE getdatabaseencoding() END, true)
"""

_ENDED = "PostgreSQL ended the connection"
_IS_STANDBY = "the server is a standby"
_LACKS_PRIVILEGE = "the user lacks a privilege: migrate grants it"
_NO_ANSWER = "no answer in time"
_NOT_THERE = "the database, the user or the table does not exist"
_SHORTAGE = "this machine has no free descriptor, port, thread or memory"

# The reasons that log lines give for errors, because PostgreSQL's messages name hosts and users.
# The SQLSTATE decides if there is one: messages are in the server's language (lc_messages).
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

# Otherwise the first text below that the error's message contains decides. psycopg has no SQLSTATE
# for a connection that fails or breaks, even if the server sent one. pgbouncer has one for all.
REASONS_BY_TEXT = {
    "Too many open files": _SHORTAGE,  # first: the message also names a file or socket
    "can't start new thread": _SHORTAGE,
    "Cannot allocate memory": _SHORTAGE,
    "through a pooler": "no notification arrives through a pooler: set DB_LISTEN_HOST or "
    "DB_LISTEN_PORT to PostgreSQL itself, or CACHE_INVALIDATION=off",
    "cannot read the password": "the password file cannot be read",
    # PostgreSQL sends the same message for a client certificate of another user.
    "password authentication failed": "wrong password, user or DB_SSLCERT",
    "SASL authentication failed": "wrong password or user",  # pgbouncer
    "not permitted to log in": "the user may not log in",
    "SSL encryption": "pg_hba.conf rejects this user from here",
    "no encryption": "pg_hba.conf rejects this user from here without tls",
    "no pg_hba.conf entry": "pg_hba.conf rejects this user from here",
    "requires a valid client certificate": "tls: the server requires a certificate, see DB_SSLCERT",
    "alert unknown ca": "tls: the server does not trust the issuer of DB_SSLCERT",
    "does not match host name": "tls: the server's certificate is for another host",
    "certificate verify failed": "tls: the server's certificate is expired or not trusted",
    "root certificate file": "tls: DB_SSLROOTCERT is missing or is no file of certificates",
    "certificate file": "tls: DB_SSLCERT cannot be used",
    "private key file": "tls: DB_SSLKEY cannot be used",
    "server does not support SSL": "tls: the server does not support it",
    "closed the connection": "the connection broke",
    "closed unexpectedly": "the connection broke",
    "SYSCALL": "the connection broke",
    "SSL": "tls: the handshake failed",
    "not currently accepting connections": "PostgreSQL does not accept connections",
    "not accepting connections": "PostgreSQL does not accept connections",
    "not yet accepting connections": "PostgreSQL is starting",
    "is starting up": "PostgreSQL is starting",
    "in recovery mode": "PostgreSQL is starting",
    "is shutting down": "PostgreSQL is stopping",
    "terminating connection": _ENDED,
    "too many": "PostgreSQL has no free connection slot",
    "remaining connection slots": "PostgreSQL has no free connection slot",
    "no more connections allowed": "the pooler has no free connection slot",
    "server login has been failing": "the pooler cannot reach PostgreSQL",
    "in hot standby mode": _IS_STANDBY,
    "does not exist": _NOT_THERE,
    "permission denied": _LACKS_PRIVILEGE,
    "Connection refused": "refused",
    "no error details": _SHORTAGE,  # libpq has no message for a lack of descriptors
    "No buffer space available": _SHORTAGE,
    "Cannot assign requested address": _SHORTAGE,
    "could not translate host name": "no such host",
    "failed to resolve host": "no such host",
    "No such file or directory": "no such socket",
    "timeout": _NO_ANSWER,
}


class Database:
    """Opens connections to one place as one role, and keeps none of them.

    libpq's own variables and files have no effect: a `Database` removes the variables.

    `hosts` names the place in log lines. `wait` is the maximum seconds that a request waits for a
    connection: `DATABASE_WAIT` per host.

    Args:
        place: hosts and ports; by default `DB_HOST` and `DB_PORT`.
        role: name and password; by default `DB_USERNAME` and its password.
        primary: skip standbys.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        place: tuple[str, str] | None = None,
        role: tuple[str, Secret] | None = None,
        primary: bool = False,
    ) -> None:
        withdraw(os.environ)
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
            "sslrootcert": settings.db_sslrootcert or NO_FILE,
            "sslcert": settings.db_sslcert or NO_FILE,
            "sslkey": settings.db_sslkey or NO_FILE,
            "sslcrl": NO_FILE,
            "connect_timeout": int(DATABASE_WAIT),
            "client_encoding": "utf8",
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
            psycopg.Error: PostgreSQL is unreachable or rejects the connection.
        """
        try:
            password = self._password.read()
        except (OSError, ValueError) as error:
            file = self._password.file
            why = f": {error.strerror}" if isinstance(error, OSError) else ""
            raise psycopg.OperationalError(f"cannot read the password in {file}{why}") from None
        # Prepared statements gain nothing for few queries and break behind transaction poolers.
        connection = psycopg.connect(
            **self._parameters, password=password, autocommit=True, prepare_threshold=None
        )
        for name in _TEXTS:
            connection.adapters.register_loader(name, _Text)
        # Not the server's default: each statement has to see all changes committed before it.
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return connection


class _Text(Loader):
    """Loads a text; a byte that is no text becomes a surrogate, or it would fail the whole query.

    A database in SQL_ASCII accepts any bytes; the service takes them for UTF-8.
    """

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        encoding = self.connection.info.encoding if self.connection else "ascii"
        self._encoding = "utf-8" if encoding == "ascii" else encoding

    def load(self, data: Buffer) -> str:
        return str(data, self._encoding, "surrogateescape")


@contextmanager
def transaction(connection: Connection, seconds: float = DATABASE_WAIT) -> Iterator[None]:
    """Run the block in a transaction that client and server limit to `seconds`.

    The server sends texts as they are stored: it would fail a query for a text that it cannot
    convert to UTF-8.

    Raises:
        psycopg.Error: PostgreSQL was too slow, disconnected, or reported an error.
    """
    limit = str(int(1000 * seconds))
    with bounded(connection, seconds + GRACE), connection.transaction():
        # The server needs a limit too, because it does not notice when we give up. The limit ends
        # with the transaction: afterwards a pooler gives the session to another client.
        connection.execute(_BEGIN, (limit,))
        yield


@contextmanager
def bounded(connection: Connection, seconds: float) -> Iterator[None]:
    """Shut the connection down if the block takes longer than `seconds`.

    A stopped server process never answers, but its kernel still acknowledges. So neither
    `statement_timeout` nor a TCP timeout ends the wait; shutting down the socket does.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        timer = threading.Timer(seconds, _shut_down, (duplicate,))
        timer.daemon = True
        start(timer)
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # before the duplicate is closed and its number reused


def _shut_down(duplicate: socket.socket) -> None:
    with suppress(OSError):  # the server closed it first
        duplicate.shutdown(socket.SHUT_RDWR)


def reason(error: BaseException) -> str:
    """Return the reason of a database error, in words that name no host and no user."""
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    if state in REASONS_BY_STATE:
        return REASONS_BY_STATE[state]
    text = str(error)
    return next((ours for theirs, ours in REASONS_BY_TEXT.items() if theirs in text), "unknown")


def log_fields(error: BaseException, host: str) -> dict[str, str]:
    """Return the fields of a log line about a database error.

    Args:
        host: `host_of` the connection, or the `hosts` of a `Database` without a connection.
    """
    return {"error": type(error).__name__, "reason": reason(error), "host": host}


def host_of(connection: Connection) -> str:
    """Return `host:port` of the connection's server."""
    return _hosts([connection.info.host], [str(connection.info.port)])


def _hosts(hosts: list[str], ports: list[str]) -> str:
    """Return `a:5432,b:5432`; a single port applies to all hosts."""
    pairs = zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=True)
    return ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in pairs)


def first_line(error: psycopg.Error) -> str:
    """Return an error's first line for an operator; later lines may quote rows."""
    line = str(error).strip().partition("\n")[0]
    return f"PostgreSQL: {line}"
