"""Checks that the serving role has the privileges it needs, and no more. Changes nothing."""

from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from notifier.errors import Refused
from notifier.settings import Settings
from notifier.store.db import COMMAND_WAIT, NO_TABLE, Connection, Database, transaction

TABLE = "notification_preferences"

# The privilege that the role needs on each kind of object, and those that it must not have.
NEEDED = {"DATABASE": "CONNECT", "SCHEMA": "USAGE", "TABLE": "SELECT"}
UNWANTED = {
    "DATABASE": ["CREATE", "TEMPORARY"],
    "SCHEMA": ["CREATE"],
    "SEQUENCE": ["USAGE", "UPDATE"],
    "TABLE": ["INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"],
}

_ROLE = """
    SELECT rolname, oid, rolsuper, rolcanlogin,
           array_remove(ARRAY[CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                              CASE WHEN rolcreatedb THEN 'CREATEDB' END,
                              CASE WHEN rolreplication THEN 'REPLICATION' END,
                              CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL)
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

# The roles whose members can do more than read. pg_database_owner is left out: its only member is
# the database's owner, which `_ownership` reports.
_POWERFUL = """
    SELECT rolname FROM pg_roles
     WHERE pg_has_role(%(role)s::oid, oid, 'MEMBER') AND oid <> %(role)s::oid
       AND rolname <> 'pg_database_owner'
       AND (rolsuper OR oid = ANY(%(owners)s::oid[])
            OR rolname IN (current_user, 'pg_execute_server_program', 'pg_write_server_files'))
     ORDER BY 1
"""


class Role(NamedTuple):
    """A role; `attributes` are its attributes beyond LOGIN and SUPERUSER."""

    name: str
    oid: int
    superuser: bool
    login: bool
    attributes: list[str]

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


def check(settings: Settings) -> list[str]:
    """Return the problems of the serving role, one line each, with the remedy.

    Raises:
        Refused: the table does not exist.
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    username = settings.db_username
    database = Database.migrating(settings)
    with database.connect() as connection, transaction(connection, COMMAND_WAIT):
        try:
            objects = find_objects(connection)
        except psycopg.errors.UndefinedTable:
            raise Refused(NO_TABLE) from None
        if not (role := find_role(connection, username)):
            return [f"role {username} does not exist: run flask --app notifier.app migrate"]
        return missing(connection, role, objects) + excess(connection, role, objects)


def find_role(connection: Connection, username: str) -> Role | None:
    """Return the role of that name, or None if there is none."""
    row = connection.execute(_ROLE, (username,)).fetchone()
    return Role(*row) if row else None


def find_objects(connection: Connection) -> list[Object]:
    """Return the objects that the service uses; the table must exist."""
    return [Object(*row) for row in connection.execute(_OBJECTS, {"table": TABLE})]


def missing(connection: Connection, role: Role, objects: list[Object]) -> list[str]:
    """Return one line with the statements that let the role serve; no line if it can."""
    statements = [] if role.login else [f"ALTER ROLE {role} LOGIN"]
    for obj in objects:
        needed = NEEDED.get(obj.kind)
        if needed and not _has(connection, role.name, obj, needed):
            statements.append(f"GRANT {needed} ON {obj} TO {role}")
    if not statements:
        return []
    return [f"role {role.name} cannot serve yet: {by_administrator(*statements)}"]


def excess(connection: Connection, role: Role, objects: list[Object]) -> list[str]:
    """Return the reasons why the role can do more than read, one line each, with the remedy."""
    if role.superuser:
        lines = [f"role {role.name} is a superuser and may do anything: choose another DB_USERNAME"]
    else:
        lines = _ownership(connection, role, objects) + _memberships(connection, role, objects)
        # Ownership and membership already explain all privileges of the role.
        lines = (lines or _privileges(connection, role, objects)) + _attributes(role)
    return lines + _of_public(connection, objects)


def _ownership(connection: Connection, role: Role, objects: list[Object]) -> list[str]:
    owned = [str(obj) for obj in objects if obj.owner == role.oid and obj.kind != "SEQUENCE"]
    if not owned:
        return []
    remedy, ours = "choose another DB_USERNAME", value(connection, "SELECT current_user")
    if ours != role.name:
        remedy += f", or {by_administrator(f'REASSIGN OWNED BY {role} TO {quoted(ours)}')}"
    return [f"role {role.name} owns {', '.join(owned)}, so it may do more than read: {remedy}"]


def _memberships(connection: Connection, role: Role, objects: list[Object]) -> list[str]:
    parameters = {"role": role.oid, "owners": [obj.owner for obj in objects]}
    return [
        f"role {role.name} is a member of {powerful}, so it may do more than read:"
        f" {by_administrator(f'REVOKE {quoted(powerful)} FROM {role}')}"
        for (powerful,) in connection.execute(_POWERFUL, parameters)
    ]


def _privileges(connection: Connection, role: Role, objects: list[Object]) -> list[str]:
    lines = []
    for obj in objects:
        its, everybodys = (_unwanted(connection, name, obj) for name in (role.name, "public"))
        if held := ", ".join(name for name in its if name not in everybodys):
            lines.append(
                f"role {role.name} has {held} on {obj}, granted by another role"
                " or to a role it is a member of: revoke that"
            )
    return lines


def _attributes(role: Role) -> list[str]:
    if not role.attributes:
        return []
    without = " ".join(f"NO{attribute}" for attribute in role.attributes)
    remedy = by_administrator(f"ALTER ROLE {role} {without}")
    return [f"role {role.name} has {', '.join(role.attributes)}: {remedy}"]


def _of_public(connection: Connection, objects: list[Object]) -> list[str]:
    return [
        f"every role has {held} on {obj}: {by_administrator(f'REVOKE {held} ON {obj} FROM PUBLIC')}"
        for obj in objects
        if (held := ", ".join(_unwanted(connection, "public", obj)))
    ]


def _unwanted(connection: Connection, username: str, obj: Object) -> list[str]:
    """Return the unwanted privileges of a role, direct or inherited; `public` means PUBLIC."""
    return [name for name in UNWANTED[obj.kind] if _has(connection, username, obj, name)]


def _has(connection: Connection, username: str, obj: Object, privilege: str) -> bool:
    query = f"SELECT has_{obj.kind.lower()}_privilege(%s::name, %s::oid, %s)"
    return bool(value(connection, query, username, obj.oid, privilege))


def value(connection: Connection, query: str, *parameters: str | int) -> Any:
    """Return the single value of a query's result."""
    ((found,),) = connection.execute(query.encode(), parameters)
    return found


def quoted(*path: str) -> str:
    """Return an identifier, quoted for SQL."""
    return sql.Identifier(*path).as_string()


def by_administrator(*statements: str) -> str:
    """Return the advice that an administrator should run `statements`."""
    return f"ask an administrator to run: {'; '.join(statements)}"
