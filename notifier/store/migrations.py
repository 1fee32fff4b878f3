"""How the database gets its schema: the migrations, applied and undone by one process at a time."""

from collections.abc import Iterator
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
from notifier.store.preferences import CHANGES

MIGRATIONS = Path(__file__).parent.parent.parent / "migrations"

# Any number will do, as long as it stays: it names this lock within the database.
LOCK_KEY = 6_684_777_082


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's backend, opening connections with our parameters instead of a URL's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        uri = DatabaseURI("postgresql+psycopg", None, None, None, None, "notifier", {})
        super().__init__(uri, default_migration_table)

    def connect(self, dburi: DatabaseURI) -> psycopg.Connection[Any]:
        return self._database.connect()

    def copy(self) -> "_Backend":
        return _Backend(self._database)

    def create_lock_table(self) -> None:
        """Create yoyo's lock table if there is none; unlike yoyo's own, this tells of a failure."""
        create = self.format_sql(self.create_lock_table_sql)
        with self.transaction():
            self.execute(create.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))

    def get_log_data(self, migration: Any = None, operation: str = "apply") -> dict[str, Any]:
        """Return yoyo's log row without the names of user and machine, whose look-up can fail in a
        container and hang on a slow resolver."""
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
    """The names of the migrations that were applied, and what to tell of the role that serves."""

    applied: list[str]
    notices: list[str]


def migrate(settings: Settings) -> Migrated:
    """Apply what is pending, possibly nothing, and let the role that serves read the result.

    Raises:
        NotGranted: the schema is up to date, but the role that serves lacks something.
        psycopg.Error: PostgreSQL cannot be reached or refused; what was applied before stays.
    """
    with _alone(settings) as (connection, backend):
        pending = backend.to_apply(read_migrations(str(MIGRATIONS)))
        names = [migration.id for migration in pending]
        backend.apply_migrations(pending)
        # No trigger tells of rows that came with the table, as from a backup.
        connection.execute(f"NOTIFY {CHANGES}")
        return Migrated(names, roles.grant(connection, settings.db_username, settings.db_password))


def rollback(settings: Settings) -> str | None:
    """Undo the last migration that is applied and return its name, None if there is none.

    Raises:
        psycopg.Error: PostgreSQL cannot be reached or refused.
    """
    with _alone(settings) as (_, backend):
        last = backend.to_rollback(read_migrations(str(MIGRATIONS)))[:1]
        names = [migration.id for migration in last]
        backend.rollback_migrations(last)
        return names[0] if names else None


@contextmanager
def _alone(settings: Settings) -> Iterator[tuple[Connection, _Backend]]:
    """Yield a connection and yoyo's backend while no other process migrates this database.

    yoyo's own lock is a row that outlives a killed process, and it looks for pending migrations
    before it takes it. PostgreSQL's advisory lock ends with the connection, however that ends; once
    it is ours, a row that is left is a dead process's. It is held by a transaction, which a pooler
    cannot part from its server process.
    """
    database = Database.migrating(settings)
    with database.connect() as holder, holder.transaction(), database.connect() as connection:
        holder.execute(f"SET LOCAL lock_timeout = '{roles.LOCK_WAIT}'")
        holder.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        holder.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
        with _Backend(database) as backend:
            backend.create_lock_table()
            backend.break_lock()
            yield connection, backend
