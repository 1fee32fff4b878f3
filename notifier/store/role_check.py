"""Checks that the serving role has the privileges it needs, and no more. Changes nothing."""

import psycopg

from notifier.errors import Refused
from notifier.settings import Settings
from notifier.store import role_limits, role_reading
from notifier.store.db import COMMAND_WAIT, NO_TABLE, Connection, Database, transaction
from notifier.store.serving_role import (
    Object,
    Role,
    by_administrator,
    find_objects,
    find_role,
    quoted,
    value,
)

# The privilege that the role needs on each kind of object, and those that it must not have.
NEEDED = {"DATABASE": "CONNECT", "SCHEMA": "USAGE", "TABLE": "SELECT"}
UNWANTED = {
    "DATABASE": ["CREATE", "TEMPORARY"],
    "SCHEMA": ["CREATE"],
    "SEQUENCE": ["USAGE", "UPDATE"],
    "TABLE": ["INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"],
}

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


def check(settings: Settings) -> list[str]:
    """Return the problems of the serving role, one line each, with the remedy.

    Raises:
        Refused: the table does not exist.
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    username = settings.db_username
    with Database.migrating(settings).connect() as connection:
        with transaction(connection, COMMAND_WAIT):
            try:
                objects = find_objects(connection)
            except psycopg.errors.UndefinedTable:
                raise Refused(NO_TABLE) from None
            if not (role := find_role(connection, username)):
                return [f"role {username} does not exist: run flask --app notifier.app migrate"]
            needs = missing(connection, role, objects)
            surplus = excess(connection, role, objects)
            surplus += role_limits.lacking(connection, role, settings)
        return (needs or role_reading.problems(connection, role, settings)) + surplus


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
    owned = [obj.plain for obj in objects if obj.owner == role.oid and obj.kind != "SEQUENCE"]
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
                f"role {role.name} has {held} on {obj.plain}, granted by another role"
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
        f"every role has {held} on {obj.plain}:"
        f" {by_administrator(f'REVOKE {held} ON {obj} FROM PUBLIC')}"
        for obj in objects
        if (held := ", ".join(_unwanted(connection, "public", obj)))
    ]


def _unwanted(connection: Connection, username: str, obj: Object) -> list[str]:
    """Return the unwanted privileges of a role, direct or inherited; `public` means PUBLIC."""
    return [name for name in UNWANTED[obj.kind] if _has(connection, username, obj, name)]


def _has(connection: Connection, username: str, obj: Object, privilege: str) -> bool:
    query = f"SELECT has_{obj.kind.lower()}_privilege(%s::name, %s::oid, %s)"
    return bool(value(connection, query, username, obj.oid, privilege))
