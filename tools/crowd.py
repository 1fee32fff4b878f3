"""Callers that send the same few bytes and then nothing, in processes of their own.

    python -m tools.crowd ORDER    # JSON with the arguments of `main`

A caller whose connection ends opens another after a pause, so the pressure lasts. The process
prints a line when all callers are connected, and ends with its standard input.
"""

import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from tools import HOST, ROOT
from tools.rig import CannotMeasure

PROCESS_CALLERS = 2500  # at most, in one process
PAUSE = 1.0  # seconds between the end of a connection and the next one
CONNECT_TIMEOUT = 5.0
OTHER_FILES = 64  # that a process needs beside its callers' connections


class Crowd:
    """The callers of a process."""

    def __init__(self, port: int, count: int, text: bytes) -> None:
        self._port = port
        self._count = count
        self._text = text
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._absent = deque([0.0] * count)  # when to open a connection, on time.monotonic()
        self._connected = 0

    def run(self) -> None:
        """Keep all callers connected until standard input ends."""
        give_up = time.monotonic() + CONNECT_TIMEOUT
        announced = False
        while True:
            now = time.monotonic()
            while self._absent and self._absent[0] <= now:
                self._absent.popleft()
                self._open()
            if not announced and (self._connected >= self._count or now > give_up):
                announced = True
                print(self._connected, flush=True)
            for key, events in self._selector.select(PAUSE / 10):
                if key.data is None:  # standard input
                    return
                self._attend(key.data, events)

    def _open(self) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((HOST, self._port))
        self._selector.register(sock, selectors.EVENT_WRITE, sock)

    def _attend(self, sock: socket.socket, events: int) -> None:
        with suppress(OSError):
            if events & selectors.EVENT_WRITE:
                sock.send(self._text)
                self._connected += 1
                self._selector.modify(sock, selectors.EVENT_READ, sock)
                return
            if sock.recv(65536):
                return
        self._selector.unregister(sock)
        sock.close()
        self._absent.append(time.monotonic() + PAUSE)


@contextmanager
def crowd(port: int, count: int, text: str = "") -> Iterator[None]:
    """Keep `count` callers connected during the block; each sends `text` once.

    Raises:
        CannotMeasure: not all of them could connect.
    """
    most = -(-count // -(-count // PROCESS_CALLERS))
    with ExitStack() as stack:
        shares = [min(most, count - done) for done in range(0, count, most)]
        started = [stack.enter_context(_process(port, share, text)) for share in shares]
        lines = [process.stdout.readline() for process in started if process.stdout]
        connected = sum(int(line or 0) for line in lines)
        if connected < count:
            raise CannotMeasure(f"only {connected} of {count} callers could connect")
        yield


def _process(port: int, count: int, text: str) -> "subprocess.Popen[str]":
    order = json.dumps({"port": port, "count": count, "text": text})
    return subprocess.Popen(
        [sys.executable, "-m", "tools.crowd", order],
        cwd=ROOT,
        stdin=subprocess.PIPE,  # closing it at the end of the block stops the process
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C must not reach it
    )


def main(port: int, count: int, text: str) -> None:
    """Keep the callers connected until standard input ends."""
    _raise_file_limit(count + OTHER_FILES)
    Crowd(port, count, text.encode()).run()


def _raise_file_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
