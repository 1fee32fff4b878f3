"""A stand-in for an email or push provider: shows what arrives, answers as it is told.

Run `python -m tools.dev.mock_provider "email 1=9090" "email 2=9091"`, open what it prints.
"""

import argparse
import contextlib
import html
import json
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Self

MAX_MESSAGES = 200
MAX_BODY_BYTES = 1024 * 1024
MAX_DELAY = 60  # seconds
PAGE = Path(__file__).with_name("mock_provider.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
# By behaviour, what a message is recorded with on arrival; "slow" is put right after its wait.
ANSWERS = {
    "accept": "200 OK",
    "503": "503 Service Unavailable",
    "429": "429 Too Many Requests",
    "slow": "waiting to answer 200 OK",
    "drop": "no answer: connection dropped",
}
START: Mapping[str, Any] = {"behaviour": "accept", "delay": 10.0, "choices": [*ANSWERS]}


@dataclass(frozen=True, slots=True)
class Message:
    """One notification that arrived; `answer` is the status line sent, or why there is none."""

    received_at: str
    request_id: str
    to: str
    title: str
    message: str
    secret_key: str
    answer: str


class MockProvider(ThreadingHTTPServer):
    """One provider on one port (0 takes a free one); raises OSError if it can't listen there.

    `messages` has the last MAX_MESSAGES, newest first; `total` counts all; `state` says how it
    answers. Request threads share the three: they are replaced with `changed` held, never altered.
    """

    request_queue_size = 128
    allow_reuse_port = False  # some Python releases share ports; here a taken one is an error
    server_bind = TCPServer.server_bind  # HTTPServer's looks the host's name up: seconds, at worst

    def __init__(self, name: str, port: int, bind: str = "127.0.0.1") -> None:
        self.name = name
        self.page = PAGE.read_text(encoding="utf-8").replace("{{name}}", html.escape(name))
        self.state = START
        self.messages: tuple[Message, ...] = ()
        self.total = 0
        self.changed = threading.Condition()
        # Only the serving thread changes it; stop() reads it once that thread has ended.
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._serving = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        super().__init__((bind, port), _Handler)
        self.port = int(self.server_address[1])
        self.url = f"http://{bind}:{self.port}/"

    def start(self) -> None:
        """Serve in a daemon thread, once."""
        self._serving.start()

    def stop(self) -> None:
        """Close the port and all client connections and wait for their threads; repeatable."""
        if self._serving.is_alive():
            self.shutdown()  # takes up to the 0.05 s between polls; for ever if unstarted
            self._serving.join()
        self.server_close()
        self.switch("accept")  # nothing is left to wait for
        for thread, connection in self._connections.items():
            with contextlib.suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def behaviour(self) -> str:
        """One of ANSWERS' keys."""
        return str(self.state["behaviour"])

    def switch(self, behaviour: Any, delay: Any = None) -> None:
        """Answer so from now on, after `delay` seconds if "slow"; None leaves the delay as it is.

        Raises ValueError, with a text for the caller, for a value that is not allowed.
        """
        with self.changed:
            delay = self.state["delay"] if delay is None else delay
            if behaviour not in tuple(ANSWERS):
                choices = ", ".join(ANSWERS)
                raise ValueError(f"behaviour is {behaviour!r:.50}; expected one of {choices}")
            if type(delay) not in (int, float) or not 0 <= delay <= MAX_DELAY:
                raise ValueError(f"delay is {delay!r:.50}; expected 0 to {MAX_DELAY} seconds")
            self.state = {**self.state, "behaviour": behaviour, "delay": float(delay)}
            self.changed.notify_all()

    def record(self, message: Message, instead_of: Message | None = None) -> None:
        """Keep a message as the newest, or in the place of one that was recorded before."""
        with self.changed:
            if instead_of is None:
                self.messages = (message, *self.messages)[:MAX_MESSAGES]
                self.total += 1
            else:
                self.messages = tuple(message if m is instead_of else m for m in self.messages)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a daemon thread that stop() can join; the base class keeps track of none."""
        args = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=args, daemon=True)
        thread.start()
        alive = {t: s for t, s in self._connections.items() if t.is_alive()}
        self._connections = alive | {thread: request}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that went away; anything else is a bug to be seen."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30  # seconds until a connection that idles or stalls is closed
    server: MockProvider

    def do_GET(self) -> None:
        own, path = self.server, self.path.partition("?")[0]
        if path == "/":
            nonce = secrets.token_urlsafe()
            policy = {"Content-Security-Policy": PAGE_POLICY.format(nonce)}
            self._reply(200, own.page.replace("{{nonce}}", nonce), **policy)
        elif path == "/messages":
            messages = [asdict(message) for message in own.messages]
            self._reply(200, {"provider": own.name, "total": own.total, "messages": messages})
        elif path == "/behaviour":
            self._reply(200, own.state)
        else:
            self.send_error(404, "no such path; there are /, /messages and /behaviour")

    do_HEAD = do_GET  # noqa: N815 - the base class wants the name

    def do_PUT(self) -> None:
        if self.path != "/behaviour":
            self.send_error(405)
        elif self.headers.get_content_type() != "application/json":
            # Foreign web pages can't send this type without asking first, and are never told yes.
            self.send_error(415, "Content-Type has to be application/json")
        elif (fields := self._read_object()) is not None:
            try:
                self.server.switch(fields.get("behaviour", ""), fields.get("delay"))
            except ValueError as error:
                self.send_error(422, str(error))
            else:
                self._reply(200, self.server.state)

    def do_POST(self) -> None:
        if (fields := self._read_object()) is None:
            return
        state = self.server.state
        behaviour = state["behaviour"]
        message = _to_message(fields, self.headers.get("X-Request-Id", ""), ANSWERS[behaviour])
        self.server.record(message)
        if behaviour == "drop":
            self._drop()
        elif behaviour != "slow" or self._outwait(message, state["delay"]):
            status = int(behaviour) if behaviour.isdecimal() else 200
            headers = {"Retry-After": "1"} if behaviour == "429" else {}
            self._reply(status, {"message": self.responses[status][0]}, **headers)

    def _drop(self) -> None:
        """Reset the connection: after a plain close, as of an idle one, some clients send again."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # else the base class ends it in good order

    def _outwait(self, message: Message, delay: float) -> bool:
        """Wait as a slow provider, then put the record right; false if the client has left."""
        began = time.monotonic()
        with self.server.changed:
            self.server.changed.wait_for(lambda: self.server.behaviour != "slow", delay)
        self.connection.setblocking(False)
        try:
            left = self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError as error:
            left = not isinstance(error, BlockingIOError)
        self.connection.settimeout(self.timeout)
        answer = "no answer: the client had left" if left else ANSWERS["accept"]
        answer = f"{answer} after {time.monotonic() - began:.1f} s"
        self.server.record(replace(message, answer=answer), instead_of=message)
        return not left

    def _read_object(self) -> dict[str, Any] | None:
        """The body's JSON object; None after answering an error if there is none."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            error = 411, "Content-Length has to give the length of the body"
        elif int(length) > MAX_BODY_BYTES:
            self.rfile.read(min(int(length), 16 * MAX_BODY_BYTES))  # else many see no answer
            error = 413, f"the body has to be at most {MAX_BODY_BYTES} bytes long"
        else:
            with contextlib.suppress(ValueError, RecursionError):
                body = json.loads(self.rfile.read(int(length)))
                if isinstance(body, dict):
                    return body
            error = 400, "the body has to be a JSON object"
        self.send_error(*error)
        return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer an error as JSON, and close: the request's body may be unread."""
        headers = {"Connection": "close"}
        if code in (405, 501):  # 501 is the base class's word for a method without a do_ function
            code, message = 405, "no such method here"
            headers["Allow"] = "GET, HEAD, POST" + (", PUT" if self.path == "/behaviour" else "")
        self._reply(code, {"error": message or self.responses[code][0]}, **headers)

    def _reply(self, status: int, body: str | Mapping[str, Any], **headers: str) -> None:
        kind = "text/html; charset=utf-8" if isinstance(body, str) else "application/json"
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def log_message(self, *args: object) -> None: ...  # the page shows what arrives


def _to_message(fields: Mapping[str, Any], request_id: str, answer: str) -> Message:
    keys = ("to", "title", "message", "secret_key")
    to, title, text, secret = (str(fields.get(key) or "") for key in keys)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    masked = f"{secret[:2] if secret[6:] else ''}***" if secret else ""
    return Message(now, request_id, to, title, text, masked, answer)


def _parse_provider(text: str) -> tuple[str, int]:
    name, _, port = text.rpartition("=")
    if not name.strip() or not re.fullmatch("[0-9]{1,5}", port) or int(port) not in range(65536):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PORT, such as 'email 1=9090'")
    return name.strip(), int(port)


def main() -> None:
    """Serve the providers on the command line until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tools.dev.mock_provider")
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("providers", nargs="+", type=_parse_provider, metavar="NAME=PORT")
    given = parser.parse_args()
    # Blocked before any thread starts, so that sigwait gets them, in whichever thread they arrive.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with contextlib.ExitStack() as running:
        for name, port in given.providers:
            try:
                provider = running.enter_context(MockProvider(name, port, given.bind))
            except OSError as error:
                parser.exit(1, f"{name}: cannot listen on {given.bind}:{port}: {error.strerror}\n")
            print(f"{name}: {provider.url}", flush=True)
        signal.sigwait(STOP_SIGNALS)


if __name__ == "__main__":
    main()
