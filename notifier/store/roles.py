"""The serving role: `migrate` creates it and lets it read the providers, nothing else."""

from psycopg.errors import DuplicateObject, InsufficientPrivilege, InternalError_, UniqueViolation

from notifier.environ import Secret
from notifier.settings import Settings
from notifier.store import role_limits, role_reading
from notifier.store.db import Connection
from notifier.store.role_check import NEEDED, UNWANTED, excess, missing
from notifier.store.serving_role import (
    TABLE,
    Object,
    Role,
    by_administrator,
    find_objects,
    find_role,
    quoted,
    run_if_allowed,
    value,
)

# PostgreSQL grants PUBLIC some unwanted privileges on these; on schemas up to version 14.
_OPEN_TO_ALL = ("DATABASE", "SCHEMA")

# Errors of a concurrent change of the same role, by a migration of another database: roles belong
# to the whole server, our lock to one database.
_CONCURRENT_CHANGE = (DuplicateObject, UniqueViolation, InternalError_)
_ATTEMPTS = 20


class NotGranted(Exception):
    """The role cannot serve; the message is one line with the remedy."""


def grant(connection: Connection, settings: Settings) -> list[str]:
    """Create the serving role, or set its password, and let it read only the providers.

    Do nothing if `connection` uses that role.

    Returns:
        notices for the operator, one line each.

    Raises:
        NotGranted: the role cannot serve; the privileges that could be granted stay granted.
        psycopg.Error: PostgreSQL is unreachable or reports an error.
    """
    if value(connection, "SELECT %s::name = session_user", settings.db_username):
        return []
    role, objects, notices = _provide(connection, settings)
    notices += role_limits.notices(connection, role, settings)
    problems = missing(connection, role, objects)
    problems = problems or role_reading.problems(connection, role, settings)
    if problems:
        raise NotGranted(*problems)
    if excess(connection, role, objects):
        notices.append(
            f"role {role.name} can do more than read: run flask --app notifier.app check-role"
        )
    return [f"role {role.name} may read {TABLE}", *notices]


def _provide(connection: Connection, settings: Settings) -> tuple[Role, list[Object], list[str]]:
    """Make every change to the role that is allowed; return the role, its objects, and notices."""
    username = settings.db_username
    verifier = _verifier(connection, username, settings.db_password)
    with connection.transaction():  # so a running service never lacks a privilege
        _create_or_alter(connection, username, verifier)
        role = find_role(connection, username)
        if role is None:
            raise _changed_by_others(username)
        objects = find_objects(connection)
        for obj in objects:
            for statement in _statements(obj, role):
                run_if_allowed(connection, statement)
        notices = role_limits.impose(connection, role, settings)
    return find_role(connection, username) or role, objects, notices


def _verifier(connection: Connection, username: str, secret: Secret) -> str:
    """Return the verifier that PostgreSQL stores; PostgreSQL never sees the password."""
    try:
        password = secret.read()
    except (OSError, ValueError):
        raise NotGranted("DB_PASSWORD_FILE cannot be read") from None
    encrypt = connection.pgconn.encrypt_password
    return encrypt(password.encode(), username.encode(), b"scram-sha-256").decode()


def _create_or_alter(connection: Connection, username: str, verifier: str) -> None:
    """Create the role, or set its password if `connection` may do so; a login proves it later."""
    for _ in range(_ATTEMPTS):
        role = find_role(connection, username)
        if role and role.superuser:
            return
        statement = f"{'ALTER' if role else 'CREATE'} ROLE {quoted(username)} LOGIN PASSWORD"
        try:
            with connection.transaction():
                connection.execute(f"{statement} '{verifier}'".encode())
        except _CONCURRENT_CHANGE:
            continue
        except InsufficientPrivilege:
            if role:
                return
            ours, by_hand = value(connection, "SELECT current_user"), f"{statement} '...'"
            raise NotGranted(
                f"role {username} does not exist, and {ours} cannot create it:"
                f" {by_administrator(by_hand)}"
                f" (or ALTER ROLE {quoted(ours)} CREATEROLE, and migrate again)"
            ) from None
        return
    raise _changed_by_others(username)


def _changed_by_others(username: str) -> NotGranted:
    return NotGranted(f"other sessions keep changing role {username}: try again")


def _statements(obj: Object, role: Role) -> list[str]:
    """Return statements that grant the role only its needed privilege, and limit PUBLIC's.

    An owner is left alone, because it would lose its own privileges. A superuser needs none.
    """
    statements = []
    if not role.superuser and obj.owner != role.oid:
        statements.append(f"REVOKE ALL ON {obj} FROM {role}")
        if obj.kind in NEEDED:
            statements.append(f"GRANT {NEEDED[obj.kind]} ON {obj} TO {role}")
    if obj.kind in _OPEN_TO_ALL:
        statements.append(f"REVOKE {', '.join(UNWANTED[obj.kind])} ON {obj} FROM PUBLIC")
    return statements
