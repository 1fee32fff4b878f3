"""Loopback addresses where nobody answers, each in its own way, and what one reads of others."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOOPBACK = "127.0.0.1"


@contextmanager
def refusing() -> Iterator[int]:
    """Yield a port that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        yield sock.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """Yield a port that takes connections and neither reads nor says anything."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def not_answering() -> Iterator[int]:
    """Yield a port where a connection is neither made nor refused: its backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=0))
        for _ in range(16):
            queued = stack.enter_context(socket.socket())
            queued.settimeout(0.2)
            try:
                queued.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


def until_the_end(sock: socket.socket) -> bytes:
    """Return all that comes until the peer closes, which must not be by a reset."""
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data
