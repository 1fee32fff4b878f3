"""The serving role and the objects that it uses, as PostgreSQL's catalogs describe them."""

from contextlib import suppress
from typing import Any, NamedTuple

from psycopg import sql
from psycopg.errors import DependentObjectsStillExist, InsufficientPrivilege

from notifier.store.db import Connection

TABLE = "notification_preferences"

_ROLE = """
    SELECT rolname, oid, rolsuper, rolcanlogin,
           array_remove(ARRAY[CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                              CASE WHEN rolcreatedb THEN 'CREATEDB' END,
                              CASE WHEN rolreplication THEN 'REPLICATION' END,
                              CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL),
           nullif(rolconnlimit, -1), coalesce(rolvaliduntil < now(), false)
      FROM pg_roles WHERE rolname = %s
"""

_OBJECTS = """
    WITH relation AS (
        SELECT oid, relkind, relname, relnamespace, relowner FROM pg_class
         WHERE oid IN (%(table)s::text::regclass,
                       pg_get_serial_sequence(%(table)s::text, 'id')::regclass)
    )
    SELECT 'DATABASE', oid, ARRAY[datname]::text[], datdba
      FROM pg_database WHERE datname = current_database()
     UNION
    SELECT 'SCHEMA', n.oid, ARRAY[nspname]::text[], nspowner
      FROM pg_namespace n JOIN relation ON n.oid = relnamespace
     UNION
    SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, relation.oid,
           ARRAY[nspname, relname]::text[], relowner
      FROM pg_namespace n JOIN relation ON n.oid = relnamespace
     ORDER BY 1
"""


class Role(NamedTuple):
    """A role; `attributes` are its attributes beyond LOGIN and SUPERUSER.

    `connections` is its connection limit; `expired` is True if its password is no longer valid.
    """

    name: str
    oid: int
    superuser: bool
    login: bool
    attributes: list[str]
    connections: int | None
    expired: bool

    def __str__(self) -> str:
        return quoted(self.name)


class Object(NamedTuple):
    """The database, or the schema, table or sequence in it; `owner` is the oid of a role."""

    kind: str
    oid: int
    path: list[str]
    owner: int

    def __str__(self) -> str:
        return f"{self.kind} {quoted(*self.path)}"

    @property
    def plain(self) -> str:
        """The object's kind and name in a sentence; `str` is for statements."""
        return f"{self.kind.lower()} {'.'.join(self.path)}"


def find_role(connection: Connection, username: str) -> Role | None:
    """Return the role of that name, or None if there is none."""
    row = connection.execute(_ROLE, (username,)).fetchone()
    return Role(*row) if row else None


def find_objects(connection: Connection) -> list[Object]:
    """Return the objects that the service uses; the table must exist."""
    return [Object(*row) for row in connection.execute(_OBJECTS, {"table": TABLE})]


def value(connection: Connection, query: str, *parameters: str | int | list[str]) -> Any:
    """Return the single value of a query's result."""
    ((found,),) = connection.execute(query.encode(), parameters)
    return found


def quoted(*path: str) -> str:
    """Return an identifier, quoted for SQL."""
    return sql.Identifier(*path).as_string()


def by_administrator(*statements: str) -> str:
    """Return the advice that an administrator should run `statements`."""
    return f"ask an administrator to run: {'; '.join(statements)}"


def run_if_allowed(connection: Connection, statement: str) -> None:
    """Run a statement that PostgreSQL may refuse, or only warn about; checks follow later."""
    refused = suppress(InsufficientPrivilege, DependentObjectsStillExist)
    with refused, connection.transaction():
        connection.execute(statement.encode())
