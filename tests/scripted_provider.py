"""A provider on a real socket that runs a test's script, however badly it behaves."""

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    method: str = "POST"

    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """The provider's end of one connection, as a script sees it; `sent` counts bytes."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._stopping = stopping
        self.sent = 0

    def read_request(self) -> Received | None:
        """Return the next request, or None if the caller has closed the connection."""
        line = self._reader.readline()
        if not line:
            return None
        headers: dict[str, str] = {}
        while header := self._reader.readline().strip():
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self._reader.read(int(headers.get("content-length", 0)))
        method, path, _ = line.decode().split()
        return Received(path, headers, body, method)

    def read_some(self) -> bytes:
        """Wait for data and return it; empty if the caller has closed the connection."""
        return self._reader.read1(65536)

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)
        self.sent += len(data)

    def send_together(self, data: bytes) -> None:
        """Send `data` so that it arrives as a whole, although TLS makes several records of it."""
        cork = getattr(socket, "TCP_CORK", 4)  # macOS: TCP_NOPUSH, which Python does not name
        self._sock.setsockopt(socket.IPPROTO_TCP, cork, 1)
        self.send(data)
        self._sock.setsockopt(socket.IPPROTO_TCP, cork, 0)

    def drip(self, data: bytes, pause: float = 0.05) -> None:
        """Send `data` over and over, a byte at a time, until the caller leaves or the test ends.

        It stops sending after 8 seconds, so that a caller without a deadline fails its test.
        """
        give_up = time.monotonic() + 8
        while time.monotonic() < give_up:
            for byte in data:
                if self._stopping.wait(pause):
                    return
                self.send(bytes([byte]))

    def tunnel(self, host: str, port: int) -> None:
        """Accept a CONNECT and relay data in both directions until one side closes."""
        with socket.create_connection((host, port)) as target:
            self.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(target, self._sock), daemon=True)
            back.start()
            _pass_on(self._sock, target)
            back.join(5)

    def pause(self, seconds: float) -> None:
        """Send nothing for `seconds`, or until the test ends."""
        self._stopping.wait(seconds)

    def hang(self) -> None:
        """Send nothing until the test ends."""
        self._stopping.wait()

    def stop_sending(self) -> None:
        """Shut down the sending side, over TLS without a close_notify; go on receiving."""
        self._sock.shutdown(socket.SHUT_WR)

    def say_goodbye(self) -> None:
        """Close properly: over TLS with a close_notify, otherwise by closing the socket."""
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(0.1)  # the caller's own close_notify may never come
            with contextlib.suppress(OSError):
                self._sock.unwrap()
        self.close()

    def reset(self) -> None:
        """Close with a TCP reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._reader.close()
        self._sock.close()


class TLSByHand:
    """The provider's side of TLS, run by hand: a script chooses which bytes to send."""

    def __init__(self, peer: Peer, context: ssl.SSLContext) -> None:
        self._peer = peer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def first_flight(self) -> bytes:
        """Read the caller's ClientHello and return the server's first reply."""
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                self._incoming.write(self._peer.read_some())
                self._tls.do_handshake()
        return self._outgoing.read()

    def open(self) -> None:
        """Complete the handshake and read a small request to its end."""
        self._peer.send(self.first_flight())
        self._finish()
        self._peer.send(self._outgoing.read())
        request = b""
        while not request.endswith(b"}"):
            request += self._read()

    def sealed(self, data: bytes) -> bytes:
        """Return `data` encrypted for the caller."""
        self._tls.write(data)
        return self._outgoing.read()

    def alert(self) -> bytes:
        """Return the alert that OpenSSL sends after a corrupt record."""
        self._incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(ssl.SSLError):
            self._tls.read()
        return self._outgoing.read()

    def _finish(self) -> None:
        while True:
            try:
                return self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._feed()

    def _read(self) -> bytes:
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._feed()

    def _feed(self) -> None:
        data = self._peer.read_some()
        if not data:
            raise ConnectionError("the caller left")
        self._incoming.write(data)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


Script = Callable[[Peer, Received], None]


def answer(status: int = 200, body: bytes = b"{}", *headers: str) -> Script:
    """Return a script that answers with `status` and keeps the connection open."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    reply = "\r\n".join([*lines, "", ""]).encode() + body
    return lambda peer, _: peer.send(reply)


def hang(peer: Peer, _: Received) -> None:
    peer.hang()


def reset(peer: Peer, _: Received) -> None:
    peer.reset()


def close(peer: Peer, _: Received) -> None:
    peer.close()


STATUS_LINE = b"HTTP/1.1 200 OK\r\n"
CHUNKED = STATUS_LINE + b"Transfer-Encoding: chunked\r\n\r\n"


def sends(data: bytes, then: Script = close) -> Script:
    """Return a script that sends `data` and then runs the script `then`."""

    def script(peer: Peer, received: Received) -> None:
        peer.send(data)
        then(peer, received)

    return script


def say_goodbye(peer: Peer, _: Received) -> None:
    peer.say_goodbye()


def drips(data: bytes) -> Script:
    return lambda peer, _: peer.drip(data, pause=0.02)


def floods(data: bytes) -> Script:
    """Return a script that sends `data` over and over, as fast as it can."""

    def script(peer: Peer, _: Received) -> None:
        while True:
            peer.send(data)

    return script


def announces(length: int, then: Script) -> Script:
    return sends(STATUS_LINE + f"Content-Length: {length}\r\n\r\n".encode(), then)


class ScriptedProvider:
    """Serves `script` on a free loopback port, over TLS if `tls` is given.

    Set `script` to change its behaviour. `received` holds the requests in order of arrival,
    `connections` counts accepted connections, and `sent` counts sent bytes. While `eager` is set,
    the script runs once for each connection, before anything has been read from it.
    """

    def __init__(self, script: Script | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.script = script or answer()
        self.eager = False
        self._tls = tls
        self._peers: list[Peer] = []
        self.received: list[Received] = []
        self.connections = 0
        self._stopping = threading.Event()
        self._serving: dict[threading.Thread, socket.socket] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/send"
        self.endpoint = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> "ScriptedProvider":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def sent(self) -> int:
        return sum(peer.sent for peer in self._peers)

    def drop_connections(self) -> None:
        """Close all connections, as a provider that restarts does."""
        for sock in list(self._serving.values()):
            with contextlib.suppress(OSError):  # already closed
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Close every connection and the listener."""
        self._stopping.set()
        # close() alone does not wake a thread that waits in accept().
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            socket.create_connection(("127.0.0.1", self.port)).close()  # macOS
        self._thread.join(5)
        self._listener.close()
        self.drop_connections()
        for thread in list(self._serving):
            thread.join(5)

    def serving(self) -> list[threading.Thread]:
        """Return the threads of all its connections, including the closed ones."""
        return list(self._serving)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            # A reset discards unsent data, so no data may wait for an acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._serving[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        peer = Peer(sock, self._stopping)
        self._peers.append(peer)
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            if self.eager:
                return self.script(peer, Received("", {}, b""))
            while not self._stopping.is_set() and (request := peer.read_request()):
                self.received.append(request)
                self.script(peer, request)
        except (OSError, ValueError):  # the caller left, or the script closed the connection
            pass
        finally:
            peer.close()
