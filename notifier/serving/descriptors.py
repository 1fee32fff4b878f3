"""The limit of open files: raised at the start, and divided between callers and providers."""

import logging
import resource
import sys
from contextlib import suppress

from notifier.settings import Settings

# Limits to ask for, if the hard limit allows them. 65,536 is more than any worker needs, and few
# enough for programs that go through all possible descriptors. macOS may refuse more than 10,240.
_LIMITS = (65_536, 10_240)

# Open files of a worker besides its connections to callers and providers: log, metrics, pipes,
# listeners, PostgreSQL, name look-ups. An idle worker has about 25.
FILES = 64

# Connections to providers for each notification in progress: a seller's makes two calls, and as
# many connections may be idle.
CALLS = 4

# The service does not start with fewer connections to callers per worker.
MIN_CONNECTIONS = 8

log = logging.getLogger("notifier")


def raise_limit() -> int:
    """Raise the soft limit of open files, unless it is high already; return the one in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _LIMITS[0]
    for limit in _LIMITS:
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        if soft < allowed:
            with suppress(OSError, ValueError):  # refused
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
                return allowed
    return soft


def connections(settings: Settings, limit: int) -> int:
    """Return the connections to callers per worker, for a `limit` of open files.

    If the limit is low, fewer callers leave fewer notifications in progress, and fewer calls.

    Raises:
        SystemExit: the limit is too low to serve.
    """
    left = limit - FILES
    room = max(left - CALLS * settings.web_threads, left // (1 + CALLS))
    if room < MIN_CONNECTIONS:
        least = FILES + (1 + CALLS) * MIN_CONNECTIONS
        sys.exit(
            f"notifier cannot start: the limit of open files (ulimit -n) is {limit}: "
            f"expected at least {least}"
        )
    return min(room, _wanted(settings))


def log_low_limit(settings: Settings) -> None:
    """Log a warning if the limit of open files leaves a worker fewer connections than it wants."""
    limit = raise_limit()
    room, wanted = connections(settings, limit), _wanted(settings)
    if room < wanted:
        log.warning(
            "the limit of open files allows few connections",
            extra={"limit": limit, "connections": room, "wanted": wanted},
        )


def _wanted(settings: Settings) -> int:
    """Return the connections that leave room for many idle ones beside those that threads serve."""
    return max(1000, 2 * settings.server_threads)
