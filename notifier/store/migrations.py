"""Applies and undoes the migrations, one process at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
from yoyo import default_migration_table, read_migrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend
from yoyo.connections import DatabaseURI

from notifier.settings import Settings
from notifier.store import roles
from notifier.store.db import Connection, Database
from notifier.store.lock_waits import LockWaits
from notifier.store.preferences import CHANGES

MIGRATIONS = Path(__file__).parent.parent.parent / "migrations"

# Key of the advisory lock in the database. The number is arbitrary, but must never change.
LOCK_KEY = 6_684_777_082


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's backend, which connects with our `LockWaits` instead of a URL."""

    def __init__(self, lock_waits: LockWaits) -> None:
        self._lock_waits = lock_waits
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, "notifier", {})
        super().__init__(uri, default_migration_table)

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[Any]:
        return self._lock_waits.connect()

    def copy(self) -> "_Backend":
        return _Backend(self._lock_waits)

    def create_lock_table(self) -> None:
        """Create yoyo's lock table unless it exists; yoyo's own method hides failures."""
        create = self.format_sql(self.create_lock_table_sql)
        with self.transaction():
            self.execute(create.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))

    def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
        """Return yoyo's log row, without the names of user and machine.

        Looking them up can fail in a container, and hang on a slow resolver.
        """
        return {
            "id": str(uuid4()),
            "migration_id": migration.id,
            "migration_hash": migration.hash,
            "username": "notifier",
            "hostname": "",
            "created_at_utc": datetime.now(UTC).replace(tzinfo=None),
            "operation": operation,
        }


class Migrated(NamedTuple):
    """The names of the applied migrations, and lines about the serving role."""

    applied: list[str]
    notices: list[str]


def migrate(settings: Settings, report: Callable[[str], None] = lambda _: None) -> Migrated:
    """Apply the pending migrations, and let the serving role read the providers.

    Args:
        report: called with the name of each migration as soon as it is applied.

    Raises:
        Refused: another session holds a lock for too long.
        NotGranted: the schema is up to date, but the role cannot serve.
        psycopg.Error: PostgreSQL is unreachable or reports an error; migrations
            that are already applied stay.
    """
    with _exclusive(settings) as (connection, backend):
        pending = backend.to_apply(read_migrations(str(MIGRATIONS)))
        for migration in pending:
            backend.apply_one(migration)
            report(migration.id)
        names = [migration.id for migration in pending]
        # No trigger fired for rows that came with the table, such as those of a restored backup.
        connection.execute(f"NOTIFY {CHANGES}")
        return Migrated(names, roles.grant(connection, settings))


def rollback(settings: Settings) -> str | None:
    """Undo the last applied migration and return its name, or None if there is none.

    Raises:
        Refused: another session holds a lock for too long.
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    with _exclusive(settings) as (_, backend):
        last = backend.to_rollback(read_migrations(str(MIGRATIONS)))[:1]
        names = [migration.id for migration in last]
        backend.rollback_migrations(last)
        return names[0] if names else None


@contextmanager
def _exclusive(settings: Settings) -> Iterator[tuple[Connection, _Backend]]:
    """Yield a connection and yoyo's backend while no other process migrates this database.

    yoyo's own lock is a row: it outlives a killed process, and yoyo takes it only after looking for
    pending migrations. An advisory lock ends with its connection. So once we hold it, any row left
    belongs to a dead process. A transaction holds it, because a pooler keeps a transaction on one
    server process.
    """
    waits = LockWaits(Database.migrating(settings))
    with (
        waits.connect() as holder,
        waits.connect() as connection,
        waits.watched(),
        holder.transaction(),
    ):
        holder.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        with waits.explained("the migration lock"):
            holder.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
        with waits.explained("another lock that this needs"), _Backend(waits) as backend:
            backend.create_lock_table()
            backend.break_lock()
            yield connection, backend
