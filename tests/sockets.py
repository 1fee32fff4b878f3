"""Loopback ports that do not answer, a lack of descriptors, and a reader that expects no reset."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LOOPBACK = "127.0.0.1"


@contextmanager
def refusing() -> Iterator[int]:
    """Yield a port that refuses connections and that no other process can bind meanwhile."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        yield sock.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """Yield a port that accepts connections but neither reads nor sends."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def not_answering() -> Iterator[int]:
    """Yield a port whose backlog is full: a connection is neither accepted nor refused."""
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


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open only `count` more descriptors during the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    for number in free:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def until_the_end(sock: socket.socket) -> bytes:
    """Return all bytes until the peer closes; a reset raises ConnectionResetError."""
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data
