"""When a request arrived, and its rank in queues."""

import socket
import struct
import sys
import time
from typing import NamedTuple

# The rank of a request is its arrival, minus `ADVANTAGE` times the pause since the last reply on
# its connection, at most `MAX_ADVANTAGE` seconds. So callers that send one request after the other
# cannot crowd out others, and others delay them by at most a second.
ADVANTAGE = 50
MAX_ADVANTAGE = 1.0

# Seconds. The kernel counts shorter times too roughly.
TICK = 0.01

# Position of tcpi_last_data_recv in Linux's struct tcp_info: milliseconds since data arrived.
_LAST_DATA = struct.Struct("=52xI")


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

    @classmethod
    def on(cls, sock: socket.socket, last_reply: float | None) -> "Arrival":
        """Return the arrival of the last bytes on a connection, even before it was accepted.

        Args:
            last_reply: when the last reply was sent on it; None before the first.
        """
        at = time.monotonic() - _seconds_since_data(sock)
        if last_reply is None:
            return cls(at, at - MAX_ADVANTAGE)
        at = max(at, last_reply)
        return cls(at, at - min(ADVANTAGE * (at - last_reply), MAX_ADVANTAGE))


def _seconds_since_data(sock: socket.socket) -> float:
    """Return the seconds since the last byte arrived; 0 for a short time, or if unknown."""
    if not sys.platform.startswith("linux"):
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA.size)
    except OSError:  # another thread has closed it, or it is no TCP connection
        return 0.0
    (milliseconds,) = _LAST_DATA.unpack(info)
    seconds: float = milliseconds / 1000
    return seconds if seconds >= TICK else 0.0
