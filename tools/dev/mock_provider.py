"""A mock email or push provider: it records each message, and scripts choose its answers."""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self

from tools.dev.json_handler import JsonHandler, Methods

MAX_MESSAGES = 200
MAX_DELAY = 60  # seconds
# The recorded answer of each behaviour; a slow answer is recorded again after its wait.
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
    """A notification that arrived. `answer` is the status line, or the reason for no answer."""

    received_at: str
    request_id: str
    to: str
    title: str
    message: str
    secret_key: str
    answer: str


class ProviderHandler(JsonHandler):
    """Accepts messages at any path; scripts use /messages and /behaviour."""

    server: "MockProvider"

    def routes(self) -> Mapping[str, Methods]:
        post = {"POST": self.take_message}
        return {
            "/messages": {"GET": self._list, "DELETE": self._clear} | post,
            "/behaviour": {"GET": self._tell, "PUT": lambda: self.switch(self.server)} | post,
        }

    def methods(self) -> Methods | None:
        found = super().methods()
        if found is None and self.command not in ("GET", "HEAD"):
            return {"POST": self.take_message}
        return found

    def takes_any_host(self) -> bool:
        return self.command == "POST"

    def switch(self, provider: "MockProvider") -> None:
        """Change how `provider` answers, as the body says."""
        if (fields := self.read_json()) is None:
            return
        try:
            provider.switch(fields.get("behaviour", ""), fields.get("delay"))
        except ValueError as error:
            self.send_error(422, str(error))
        else:
            self.reply(200, provider.state)

    def _tell(self) -> None:
        self.reply(200, self.server.state)

    def _list(self) -> None:
        own = self.server
        messages = [asdict(message) for message in own.messages]
        self.reply(200, {"provider": own.name, "total": own.total, "messages": messages})

    def _clear(self) -> None:
        self.server.clear()
        self._list()

    def take_message(self) -> None:
        """Record the message in the body, and answer as the behaviour says."""
        if (fields := self.read_object()) is None:
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
            self.reply(status, {"message": self.responses[status][0]}, **headers)

    def _drop(self) -> None:
        """Reset the connection: after a plain close, as of an idle one, some clients resend."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # otherwise the base class closes it gracefully

    def _outwait(self, message: Message, delay: float) -> bool:
        """Wait as a slow provider, then correct the record; return False if the client has left."""
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
        self.server.correct(message, replace(message, answer=answer))
        return not left


class MockProvider(ThreadingHTTPServer):
    """One provider on one port (0 takes a free one); raises OSError if it can't listen there.

    `messages` has the last MAX_MESSAGES, newest first; `total` counts all, `accepted` those that
    it accepted; `state` says how it answers. Request threads share the four: they are replaced
    with `changed` held, never altered.
    """

    request_queue_size = 128
    allow_reuse_port = False  # some Python releases share ports; here a taken one is an error
    server_bind = TCPServer.server_bind  # HTTPServer's looks the host's name up: seconds, at worst

    def __init__(self, name: str, port: int, bind: str = "127.0.0.1") -> None:
        self.name = name
        self.state = START
        self.messages: tuple[Message, ...] = ()
        self.total = self.accepted = 0
        self.changed = threading.Condition()
        # Only the serving thread changes it; stop() reads it once that thread has ended.
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._serving = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        super().__init__((bind, port), ProviderHandler)
        self.port = int(self.server_address[1])
        self.url = f"http://{bind}:{self.port}/"

    def start(self) -> None:
        """Serve in a daemon thread, once."""
        self._serving.start()

    def stop(self) -> None:
        """Close the port and all client connections and wait for their threads; repeatable."""
        if self._serving.is_alive():
            self.shutdown()  # takes up to 0.05 s; blocks forever if it was not started
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

    def record(self, message: Message) -> None:
        """Keep a message as the newest."""
        with self.changed:
            self.messages = (message, *self.messages)[:MAX_MESSAGES]
            self.total += 1
            self.accepted += _is_accepted(message)

    def correct(self, before: Message, after: Message) -> None:
        """Replace a recorded message, unless it has been cleared."""
        with self.changed:
            if any(message is before for message in self.messages):
                self.messages = tuple(after if m is before else m for m in self.messages)
                self.accepted += _is_accepted(after)

    def clear(self) -> None:
        """Forget all messages, and count from zero."""
        with self.changed:
            self.messages = ()
            self.total = self.accepted = 0

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


def _to_message(fields: Mapping[str, Any], request_id: str, answer: str) -> Message:
    keys = ("to", "title", "message", "secret_key")
    to, title, text, secret = (str(fields.get(key) or "") for key in keys)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    masked = f"{secret[:2] if secret[6:] else ''}***" if secret else ""
    return Message(now, request_id, to, title, text, masked, answer)


def _is_accepted(message: Message) -> bool:
    return message.answer.startswith("200")
