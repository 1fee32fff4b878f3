"""The limits of the serving role: connections, the time of a statement, and no large objects."""

from notifier.settings import Settings
from notifier.store.db import COMMAND_WAIT, Connection
from notifier.store.serving_role import Role, by_administrator, quoted, run_if_allowed, value

# Connections of a worker: its listener and a short-lived one, twice while a reload overlaps.
PER_WORKER = 4

# As long as the longest limit that a command sets for itself.
STATEMENT_TIMEOUT = f"{COMMAND_WAIT:g}s"

_OPEN = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"

# The setting of the role in this database comes before the one in all databases. 0 is no limit.
_HAS_TIMEOUT = """
    SELECT coalesce((
        SELECT setting ~ '[1-9]' FROM pg_db_role_setting, unnest(setconfig) AS setting
         WHERE setrole = %s::oid AND setting LIKE 'statement\\_timeout=%%'
           AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
         ORDER BY setdatabase DESC LIMIT 1), false)
"""

# The functions of large objects that the role may call, as a list for REVOKE, and the roles that
# these were granted to: itself, those that it inherits from, or PUBLIC, which is null.
_FUNCTIONS = """
    SELECT coalesce(string_agg(DISTINCT its.oid::regprocedure::text, ', '), ''),
           coalesce(array_agg(DISTINCT rolname::text), '{}')
      FROM pg_proc AS its
     CROSS JOIN aclexplode(coalesce(proacl, acldefault('f', proowner))) AS granted
      LEFT JOIN pg_roles AS role ON role.oid = grantee
     WHERE pronamespace = 'pg_catalog'::regnamespace
       AND (proname LIKE 'lo\\_%%' OR proname IN ('loread', 'lowrite'))
       AND CASE grantee WHEN 0 THEN true ELSE pg_has_role(%s::oid, grantee, 'USAGE') END
"""

_USED_BY_OTHERS = """
    SELECT EXISTS (SELECT FROM pg_largeobject_metadata WHERE lomowner <> %s::oid)
"""


def impose(connection: Connection, role: Role, settings: Settings) -> list[str]:
    """Limit the role as far as `connection` may; return a line about a change for other roles.

    A superuser has no limits. Two limits that would stop others are left out: too few connections
    for the workers that run now, and the large objects of other roles of the database.
    """
    if role.superuser:
        return []
    run_if_allowed(connection, _set_timeout(connection, role))
    if _needed(connection, role) <= _limit(settings):
        run_if_allowed(connection, _set_connections(role, _limit(settings)))
    revoke = _revoke(connection, role)
    if not revoke or value(connection, _USED_BY_OTHERS, role.oid):
        return []
    run_if_allowed(connection, revoke)
    if _revoke(connection, role):
        return []
    return ["roles other than superusers may no longer store large objects in this database"]


def notices(connection: Connection, role: Role, settings: Settings) -> list[str]:
    """Return a line about the role's connections, and one for each limit that it lacks."""
    if role.superuser:
        return []
    limit, needed = _limit(settings), _needed(connection, role)
    if needed > limit and role.connections != limit:
        line = (
            f"role {role.name} has {needed // 2} connections, and a reload needs up to {needed}, so"
            f" its limit is not set to {limit}: set WEB_INSTANCES to the number of instances"
        )
    elif role.connections is None:
        return lacking(connection, role, settings)
    else:
        line = f"role {role.name} may open at most {role.connections} connections"
        if role.connections == limit:
            line += f" ({PER_WORKER} * WEB_CONCURRENCY * WEB_INSTANCES)"
    return [line, *_unlimited(connection, role)]


def lacking(connection: Connection, role: Role, settings: Settings) -> list[str]:
    """Return the limits that the role lacks, one line each, with the remedy."""
    if role.superuser:
        return []
    lines = _unlimited(connection, role)
    if role.connections is None:
        remedy = by_administrator(_set_connections(role, _limit(settings)))
        lines.insert(0, f"role {role.name} has no connection limit: {remedy}")
    return lines


def _unlimited(connection: Connection, role: Role) -> list[str]:
    """Return the limits that the role lacks, other than that of its connections."""
    lines = []
    if not value(connection, _HAS_TIMEOUT, role.oid):
        remedy = by_administrator(_set_timeout(connection, role))
        lines.append(f"role {role.name} has no statement_timeout: {remedy}")
    if revoke := _revoke(connection, role):
        used = value(connection, _USED_BY_OTHERS, role.oid)
        others = ", as other roles do" if used else ""
        where = f"in database {value(connection, 'SELECT current_database()')}"
        remedy = by_administrator(revoke)
        lines.append(f"role {role.name} may store large objects{others}: {where}, {remedy}")
    return lines


def more_connections(connection: Connection, role: Role, settings: Settings) -> str:
    """Return the statement that lets a role log in that has used up its connection limit."""
    return _set_connections(role, max(_limit(settings), _needed(connection, role)))


def _limit(settings: Settings) -> int:
    return PER_WORKER * settings.web_concurrency * settings.web_instances


def _needed(connection: Connection, role: Role) -> int:
    """Return the connections that a reload of the workers that run now needs."""
    return 2 * int(value(connection, _OPEN, role.name))


def _set_connections(role: Role, limit: int) -> str:
    return f"ALTER ROLE {role} CONNECTION LIMIT {limit}"


def _set_timeout(connection: Connection, role: Role) -> str:
    database = quoted(value(connection, "SELECT current_database()"))
    return f"ALTER ROLE {role} IN DATABASE {database} SET statement_timeout = '{STATEMENT_TIMEOUT}'"


def _revoke(connection: Connection, role: Role) -> str:
    """Return the statement that takes large objects away; an empty one if none is needed."""
    ((functions, grantees),) = connection.execute(_FUNCTIONS, (role.oid,))
    names = ["PUBLIC" if name is None else quoted(name) for name in grantees]
    return functions and f"REVOKE EXECUTE ON FUNCTION {functions} FROM {', '.join(names)}"
