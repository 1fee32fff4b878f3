"""Reads rows of `notification_preferences` so that a bad row harms only itself."""

import re
from typing import Any

from notifier.models import COLUMNS, Provider, Unusable

# Maximum bytes of each text. PostgreSQL neither reads nor sends a longer one.
LIMITS = {
    "id": 100,
    "provider_type": 1000,
    "provider_name": 1000,
    "host": 8192,
    "secret_key": 65536,
}


def _bounded(column: str) -> str:
    # `::text` because an operator may have made the table.
    return f"CASE WHEN octet_length({column}::text) <= {LIMITS[column]} THEN {column}::text END"


def _too_long() -> str:
    cases = (
        f"WHEN octet_length({name}::text) > {most} THEN '{name}'" for name, most in LIMITS.items()
    )
    return f"CASE {' '.join(cases)} END"


# The SELECT list that `provider` reads: the columns, and the name of one that is too long.
SELECTED = ", ".join([*map(_bounded, COLUMNS), _too_long()])
WIDTH = len(COLUMNS) + 1


def provider(row: tuple[Any, ...]) -> Provider:
    """Make a provider of the values of `SELECTED`.

    Raises:
        Unusable: a value is missing, too long or no text, the id is no integer, or the channel is
            unknown.
    """
    entry_id, *values, too_long = row
    if too_long:
        raise Unusable(too_long, f"longer than {LIMITS[too_long]} bytes")
    return Provider.from_row((integer(entry_id), *values))


def integer(text: str | None) -> int | str | None:
    """Return the integer that PostgreSQL has written as `text`, or `text` if it is none."""
    return int(text) if text and re.fullmatch("0|-?[1-9][0-9]*", text) else text
