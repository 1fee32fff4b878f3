"""The HTTP side of the development servers: routes, JSON bodies and errors, local clients."""

import contextlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

MAX_BODY_BYTES = 1024 * 1024

Methods = Mapping[str, Callable[[], None]]


class JsonHandler(BaseHTTPRequestHandler):
    """Calls the method's function in `routes`; answers every error as JSON."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30  # seconds until an idle or stalled connection is closed

    def routes(self) -> Mapping[str, Methods]:
        """Return the functions by path and method; GET answers HEAD too."""
        raise NotImplementedError

    def methods(self) -> Methods | None:
        """Return the functions of the requested path, None if there is no such path."""
        return self.routes().get(self.path.partition("?")[0])

    def takes_any_host(self) -> bool:
        """Return whether the request may name this server by any host name."""
        return False

    def parse_request(self) -> bool:
        """Refuse unknown host names: a foreign page's own may lead here (DNS rebinding)."""
        if not super().parse_request():
            return False
        if self.takes_any_host() or _is_local(self.headers.get("Host", "localhost")):
            return True
        self.send_error(421, "the Host header has to be an IP address or localhost")
        return False

    def do_GET(self) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        methods = self.methods()
        if methods is None:
            self.send_error(404, f"no such path; there are {', '.join(self.routes())}")
        elif method in methods:
            methods[method]()
        else:
            self.send_error(405)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the base class wants the names

    def read_json(self) -> dict[str, Any] | None:
        """Return the body's JSON object; answer an error and return None if there is none.

        A foreign web page cannot send this content type: the browser asks for permission first.
        """
        if self.headers.get_content_type() == "application/json":
            return self.read_object()
        self.send_error(415, "Content-Type has to be application/json")
        return None

    def read_object(self) -> dict[str, Any] | None:
        """Return the body's JSON object, whatever its content type; see `read_json`."""
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
        if code in (405, 501):  # the base class answers 501 for a method without a do_ function
            code, message = 405, "no such method here"
            allowed = [*(self.methods() or ())]
            if "GET" in allowed:
                allowed.insert(1, "HEAD")
            headers["Allow"] = ", ".join(allowed)
        self.reply(code, {"error": message or self.responses[code][0]}, **headers)

    def reply(self, status: int, body: Mapping[str, Any], **headers: str) -> None:
        """Answer with `body` as JSON."""
        self.send_content(status, json.dumps(body).encode(), "application/json", **headers)

    def send_content(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        """Answer with `content`, of the media type `kind`."""
        headers |= {"Content-Type": kind, "Content-Length": str(len(content))}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def log_message(self, *args: object) -> None: ...  # the page shows each message


def _is_local(host: str) -> bool:
    """Return whether a Host header names this machine: DNS rebinding needs a name of its own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
