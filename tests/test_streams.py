"""Streams for a client of another protocol: they switch to TLS midway and keep one deadline."""

import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from notifier.environ import trust
from notifier.wire.streams import (
    MIN_READ_BYTES,
    PHASE_BYTES,
    TLS,
    Budget,
    Overlong,
    Stream,
    connect,
    look_up,
)
from tests.service import ROOT
from tests.sockets import LOOPBACK, silent
from tests.timing import within

Certificate = tuple[Path, ssl.SSLContext]


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Yield a port whose first connection is served by `serve`."""
    with socket.create_server((LOOPBACK, 0)) as listener:

        def accept() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(10)
                serve(sock)

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


def line(budget: Budget, stream: Stream) -> bytes:
    text = b""
    while not text.endswith(b"\r\n"):
        text += stream.receive(budget)
    return text


def test_a_client_can_switch_from_plain_text_to_tls_as_for_a_mail_server(
    certificate: Certificate,
) -> None:
    bundle, server_context = certificate
    heard: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 mail ESMTP\r\n")
        heard.append(sock.recv(100))
        sock.sendall(b"220 ready\r\n")
        with server_context.wrap_socket(sock, server_side=True) as secure:
            heard.append(secure.recv(100))
            secure.sendall(b"250 hello\r\n")
            assert secure.recv(100) == b""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, str(bundle))
    budget = Budget(time.monotonic() + 5)
    with serving(serve) as port:
        plain = connect(budget, look_up(LOOPBACK, port))
        assert line(budget, plain) == b"220 mail ESMTP\r\n"
        plain.send(budget, b"STARTTLS\r\n")
        assert line(budget, plain) == b"220 ready\r\n"
        secure = TLS(budget, plain, context, "localhost")
        secure.send(budget, b"EHLO notifier\r\n")
        assert line(budget, secure) == b"250 hello\r\n"
        secure.close()
    assert heard == [b"STARTTLS\r\n", b"EHLO notifier\r\n"]


def test_reading_from_a_silent_peer_ends_at_the_deadline() -> None:
    with silent() as port, within(3):
        budget = Budget(time.monotonic() + 0.2)
        stream = connect(budget, look_up(LOOPBACK, port))
        with pytest.raises(TimeoutError):
            stream.receive(budget)
        stream.close()


def test_reading_too_many_bytes_in_one_phase_is_an_error() -> None:
    def serve(sock: socket.socket) -> None:
        with suppress(OSError):  # the client left
            while True:
                sock.sendall(bytes(65536))

    budget = Budget(time.monotonic() + 10)
    with serving(serve) as port:
        stream = connect(budget, look_up(LOOPBACK, port))
        budget.extend(100_000)
        with pytest.raises(Overlong):
            deque(iter(lambda: stream.receive(budget), b""), maxlen=0)
        stream.close()


def test_data_longer_than_a_tls_record_arrives_whole(certificate: Certificate) -> None:
    bundle, server_context = certificate
    body, got = bytes(range(256)) * 1000, bytearray()

    def serve(sock: socket.socket) -> None:
        with server_context.wrap_socket(sock, server_side=True) as secure:
            while len(got) < len(body):
                got.extend(secure.recv(65536))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, str(bundle))
    budget = Budget(time.monotonic() + 10)
    with serving(serve) as port:
        stream = TLS(budget, connect(budget, look_up(LOOPBACK, port)), context, LOOPBACK)
        stream.send(budget, body)
    stream.close()
    assert bytes(got) == body


def test_reads_of_single_bytes_use_up_the_budget() -> None:
    budget = Budget(0.0)
    for _ in range(PHASE_BYTES // MIN_READ_BYTES):
        budget.spend(1)
    with pytest.raises(Overlong):
        budget.spend(1)


STOPPED_WHILE_IT_WAITS = """
import socket, time
from notifier.wire.streams import Budget, connect, look_up

with socket.create_server(("127.0.0.1", 0)) as listener:
    stream = connect(Budget(time.monotonic() + 5), look_up(*listener.getsockname()))
    began = time.monotonic()
    print("waiting", flush=True)
    try:
        stream.receive(Budget(began + 1))
    except TimeoutError:
        print(time.monotonic() - began)
"""


@pytest.mark.usefixtures("processes")
def test_a_wait_does_not_start_anew_when_the_process_is_stopped_and_continued() -> None:
    """The kernel's own receive time-out would start anew at each stop."""
    command = [sys.executable, "-c", STOPPED_WHILE_IT_WAITS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        for _ in range(5):
            time.sleep(0.15)  # within its second
            process.send_signal(signal.SIGSTOP)
            process.send_signal(signal.SIGCONT)
        took = float(process.stdout.readline())
    assert took < 1.5
