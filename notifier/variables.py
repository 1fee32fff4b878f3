"""The environment variables that are not settings: those without effect, and misspelt ones."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches

# Variables of the Go service's cache and framework that have no counterpart here.
WITHOUT_EFFECT = ("GIN_MODE", "CACHE_NUM_COUNTERS", "CACHE_MAX_COST", "CACHE_BUFFER_ITEMS")

# Prefixes of our variables that other programs' variables have as well.
_COMMON_PREFIXES = {"APP_", "LOG_"}

# Variables that systemd sets for its services.
_SYSTEMD = {"CACHE_DIRECTORY", "NOTIFY_SOCKET"}

# How similar a variable without our prefixes is to ours (difflib's ratio) to count as misspelt.
_SIMILAR = 0.9

# Kubernetes sets these for each of the namespace's services, one named `db` or `web` included.
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT_[0-9]+_(TCP|UDP|SCTP)")


def unknown_variables(environ: Mapping[str, str], settings: Collection[str]) -> dict[str, str]:
    """Return the variables that are no settings but look like one, each with the nearest setting.

    A variable looks like a setting if it has a prefix of ours, or nearly a name of ours. An empty
    one counts as unset. Case does not matter: a setting in lower case is misspelt too.

    Args:
        settings: the names of the variables that are settings.
    """
    ours = tuple({f"{name.rpartition('_')[0]}_" for name in settings} - _COMMON_PREFIXES)
    unknown = {}
    for name in environ.keys() - {*settings, *WITHOUT_EFFECT, *_SYSTEMD}:
        if not environ[name].strip() or _is_service_link(name, environ):
            continue
        least = 0.0 if name.upper().startswith(ours) else _SIMILAR
        for nearest in get_close_matches(name.upper(), settings, 1, least):
            unknown[name] = nearest
    return dict(sorted(unknown.items()))


def _is_service_link(name: str, environ: Mapping[str, str]) -> bool:
    return bool(_SERVICE_LINK.search(name)) or f"{name.removesuffix('PORT')}SERVICE_HOST" in environ
