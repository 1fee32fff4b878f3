"""When a request arrived."""

import time
from typing import NamedTuple


class Arrival(NamedTuple):
    """When a request arrived, on `time.monotonic()`, and its rank in queues: the lowest is first.

    A rank is a time, too: the arrival, or earlier if the request has an advantage.
    """

    time: float
    rank: float

    @classmethod
    def now(cls) -> "Arrival":
        """Return the arrival of a request that has not waited."""
        now = time.monotonic()
        return cls(now, now)
