"""Who may do what in the database: the role that serves reads the providers, and nothing else."""

from contextlib import suppress
from typing import Any, NamedTuple

from psycopg import sql
from psycopg.errors import (
    DependentObjectsStillExist,
    DuplicateObject,
    InsufficientPrivilege,
    InternalError_,
    UniqueViolation,
)

from notifier.environ import Secret
from notifier.store.db import Connection

TABLE = "notification_preferences"

# What the role that serves needs on each kind of thing, and what it is not to have.
NEEDED = {"DATABASE": "CONNECT", "SCHEMA": "USAGE", "TABLE": "SELECT"}
UNWANTED = {
    "DATABASE": ["CREATE", "TEMPORARY"],
    "SCHEMA": ["CREATE"],
    "SEQUENCE": ["USAGE", "UPDATE"],
    "TABLE": ["INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"],
}
# Where PostgreSQL itself gives some of it to everybody, in schemas up to version 14.
OF_PUBLIC = ("DATABASE", "SCHEMA")

# Roles are the whole server's and our lock is one database's: another one's migration that makes or
# changes the same role at this moment makes ours fail in one of these ways, and try again.
_CONCURRENT_CHANGE = (DuplicateObject, UniqueViolation, InternalError_)
_ATTEMPTS = 20

# What a migration waits for another one: of this database, or of another one's same role.
LOCK_WAIT = "60s"

_ROLES = """
    SELECT rolname, oid, rolsuper, rolcanlogin,
           array_remove(ARRAY[CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                              CASE WHEN rolcreatedb THEN 'CREATEDB' END,
                              CASE WHEN rolreplication THEN 'REPLICATION' END,
                              CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL)
      FROM pg_roles WHERE rolname = %s
"""

_THINGS = """
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

# The database's owner is a member of pg_database_owner, but owning the database says that already.
_MIGHTY = """
    SELECT rolname FROM pg_roles
     WHERE pg_has_role(%(role)s::oid, oid, 'MEMBER') AND oid <> %(role)s::oid
       AND rolname <> 'pg_database_owner'
       AND (rolsuper OR oid = ANY(%(owners)s::oid[])
            OR rolname IN (current_user, 'pg_execute_server_program', 'pg_write_server_files'))
     ORDER BY 1
"""


class NotGranted(Exception):
    """The role that serves cannot do so; the message is one line that says what would help."""


class _Role(NamedTuple):
    name: str
    oid: int
    superuser: bool
    login: bool
    attributes: list[str]

    def __str__(self) -> str:
        return _quoted(self.name)


class _Thing(NamedTuple):
    kind: str
    oid: int
    path: list[str]
    owner: int

    def __str__(self) -> str:
        return f"{self.kind} {_quoted(*self.path)}"


def grant(connection: Connection, username: str, secret: Secret) -> list[str]:
    """Make the role that serves, or give it its password, and let it read the providers only.

    Nothing is done if `connection` is that role's own.

    Returns:
        what the operator should know, in lines.

    Raises:
        NotGranted: the role cannot serve; what could be granted is.
        psycopg.Error: PostgreSQL cannot be reached or refused.
    """
    if _value(connection, "SELECT %s::name = session_user", username):
        return []
    verifier = _verifier(connection, username, secret)
    with connection.transaction():  # at no moment does a service that runs lack what it needs
        connection.execute(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'".encode())
        notices = _provide(connection, username, verifier)
        (role,) = _roles(connection, username)
        things = [_Thing(*row) for row in connection.execute(_THINGS, {"table": TABLE})]
        for thing in things:
            for statement in _statements(thing, role):
                _run_if_allowed(connection, statement)
    if missing := _missing(connection, role, things):
        raise NotGranted(f"role {role.name} cannot serve yet: {_administrator(*missing)}")
    notices += _excess(connection, role, things) + _of_public(connection, things)
    return [f"role {role.name} may read {TABLE}", *notices]


def _verifier(connection: Connection, username: str, secret: Secret) -> str:
    """Return what PostgreSQL keeps in place of a password, which it thus never gets to see."""
    try:
        password = secret.read()
    except (OSError, ValueError):
        raise NotGranted("DB_PASSWORD_FILE cannot be read") from None
    encrypt = connection.pgconn.encrypt_password
    return encrypt(password.encode(), username.encode(), b"scram-sha-256").decode()


def _provide(connection: Connection, username: str, verifier: str) -> list[str]:
    """Make the role, or give it its password; return what the operator should know."""
    ours = _value(connection, "SELECT current_user")
    for _ in range(_ATTEMPTS):
        known = _roles(connection, username)
        if any(role.superuser for role in known):
            return []
        statement = f"{'ALTER' if known else 'CREATE'} ROLE {_quoted(username)} LOGIN PASSWORD"
        by_hand = _administrator(f"{statement} '...'")
        try:
            with connection.transaction():
                connection.execute(f"{statement} '{verifier}'".encode())
        except _CONCURRENT_CHANGE:
            continue
        except InsufficientPrivilege:
            if known:
                return [f"role {username} keeps its password, {ours} cannot set it: {by_hand}"]
            raise NotGranted(
                f"role {username} does not exist, and {ours} cannot make it: {by_hand}"
                f" (or ALTER ROLE {_quoted(ours)} CREATEROLE, and migrate again)"
            ) from None
        return []
    raise NotGranted(f"role {username} is being changed by others all the time: try again")


def _statements(thing: _Thing, role: _Role) -> list[str]:
    """Return what takes away all that the role and everybody have, and grants what is needed.

    An owner would lose what it has as such, and a superuser needs nothing.
    """
    statements = []
    if not role.superuser and thing.owner != role.oid:
        statements.append(f"REVOKE ALL ON {thing} FROM {role}")
        if thing.kind in NEEDED:
            statements.append(f"GRANT {NEEDED[thing.kind]} ON {thing} TO {role}")
    if thing.kind in OF_PUBLIC:
        statements.append(f"REVOKE {', '.join(UNWANTED[thing.kind])} ON {thing} FROM PUBLIC")
    return statements


def _run_if_allowed(connection: Connection, statement: str) -> None:
    """Run what PostgreSQL may refuse, or only warn about: what came of it is asked afterwards."""
    refused = suppress(InsufficientPrivilege, DependentObjectsStillExist)
    with refused, connection.transaction():
        connection.execute(statement.encode())


def _missing(connection: Connection, role: _Role, things: list[_Thing]) -> list[str]:
    """Return the statements without which the role cannot serve."""
    log_in = [] if role.login else [f"ALTER ROLE {role} LOGIN"]
    return log_in + [
        f"GRANT {NEEDED[thing.kind]} ON {thing} TO {role}"
        for thing in things
        if thing.kind in NEEDED and not _has(connection, role.name, thing, NEEDED[thing.kind])
    ]


def _excess(connection: Connection, role: _Role, things: list[_Thing]) -> list[str]:
    """Return what lets the role do more than read, and how to end that."""
    if role.superuser:
        return [f"role {role.name} is a superuser and may do anything: choose another DB_USERNAME"]
    notices = _ownership(connection, role, things) + _memberships(connection, role, things)
    if not notices:  # which would explain all there is
        notices = _privileges(connection, role, things)
    if role.attributes:
        without = " ".join(f"NO{attribute}" for attribute in role.attributes)
        has, lose = ", ".join(role.attributes), _administrator(f"ALTER ROLE {role} {without}")
        notices.append(f"role {role.name} has {has}: {lose}")
    return notices


def _ownership(connection: Connection, role: _Role, things: list[_Thing]) -> list[str]:
    owned = [str(thing) for thing in things if thing.owner == role.oid and thing.kind != "SEQUENCE"]
    if not owned:
        return []
    ours = _quoted(_value(connection, "SELECT current_user"))
    give_away = _administrator(f"REASSIGN OWNED BY {role} TO {ours}")
    more = f"role {role.name} owns {', '.join(owned)}, so it may do more than read"
    return [f"{more}: choose another DB_USERNAME, or {give_away}"]


def _memberships(connection: Connection, role: _Role, things: list[_Thing]) -> list[str]:
    parameters = {"role": role.oid, "owners": [thing.owner for thing in things]}
    return [
        f"role {role.name} is a member of {mighty}, so it may do more than read:"
        f" {_administrator(f'REVOKE {_quoted(mighty)} FROM {role}')}"
        for (mighty,) in connection.execute(_MIGHTY, parameters)
    ]


def _privileges(connection: Connection, role: _Role, things: list[_Thing]) -> list[str]:
    """Return what the role has by others' grants or by its other roles."""
    notices = []
    for thing in things:
        everybodys = _held(connection, "public", thing)
        if held := [name for name in _held(connection, role.name, thing) if name not in everybodys]:
            notices.append(
                f"role {role.name} has {', '.join(held)} on {thing}, granted by another role"
                " or to a role it is a member of: revoke that"
            )
    return notices


def _of_public(connection: Connection, things: list[_Thing]) -> list[str]:
    """Return what everybody still has, and how to end that."""
    notices = []
    for thing in things:
        if held := ", ".join(_held(connection, "public", thing)):
            revoke = _administrator(f"REVOKE {held} ON {thing} FROM PUBLIC")
            notices.append(f"every role has {held} on {thing}: {revoke}")
    return notices


def _held(connection: Connection, username: str, thing: _Thing) -> list[str]:
    """Return what is unwanted and a role has, be it by another one; `public` is everybody."""
    return [name for name in UNWANTED[thing.kind] if _has(connection, username, thing, name)]


def _has(connection: Connection, username: str, thing: _Thing, privilege: str) -> bool:
    query = f"SELECT has_{thing.kind.lower()}_privilege(%s::name, %s::oid, %s)"
    return bool(_value(connection, query, username, thing.oid, privilege))


def _roles(connection: Connection, username: str) -> list[_Role]:
    """Return the role of that name, or nothing."""
    return [_Role(*row) for row in connection.execute(_ROLES, (username,))]


def _value(connection: Connection, query: str, *parameters: str | int) -> Any:
    ((value,),) = connection.execute(query.encode(), parameters)
    return value


def _quoted(*path: str) -> str:
    return sql.Identifier(*path).as_string()


def _administrator(*statements: str) -> str:
    return f"let an administrator run: {'; '.join(statements)}"
