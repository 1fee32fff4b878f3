"""The sandbox's ports: each provider's endpoint, and the page beside the first of them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from tools.dev.json_handler import Methods
from tools.dev.mock_provider import MockProvider, ProviderHandler
from tools.dev.sandbox.journal import Journal, ServiceUnreachable

FOLDER = Path(__file__).parent
OWN = "/sandbox/"  # the page's paths; any other may take a message
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    f"{OWN}page.css": ("page.css", "text/css; charset=utf-8"),
    f"{OWN}page.js": ("page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)


class Sandbox:
    """Mock providers and their page, which is on the port of the first of them.

    Args:
        mocks: name and port of each provider; port 0 takes a free one.
        service: the service's base URL.

    Raises:
        OSError: a port is not available; its `strerror` names the port and the cause.
    """

    def __init__(
        self, mocks: Sequence[tuple[str, int]], service: str, bind: str = "127.0.0.1"
    ) -> None:
        with ExitStack() as stack:
            self.providers = [_listening(stack, name, port, bind) for name, port in mocks]
            self._stack = stack.pop_all()
        first, *others = self.providers
        self.url = first.url
        self._journal = Journal(service, self.providers)
        first.RequestHandlerClass = partial(_PageHandler, self._journal)
        for provider in others:
            provider.RequestHandlerClass = partial(_BesideHandler, first.port)

    def __enter__(self) -> Self:
        for provider in self.providers:
            provider.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def heard(self, entry: Mapping[str, Any]) -> None:
        """Take one parsed line of the service's log, of any kind."""
        self._journal.heard(entry)


def _listening(stack: ExitStack, name: str, port: int, bind: str) -> MockProvider:
    try:
        provider = MockProvider(name, port, bind)
    except OSError as error:
        problem = f"{name}: cannot listen on {bind}:{port}: {error.strerror}"
        raise OSError(error.errno, problem) from error
    stack.callback(provider.stop)
    return provider


class _PageHandler(ProviderHandler):
    """The first provider's endpoint and the page."""

    def __init__(self, journal: Journal, *args: Any) -> None:
        self._journal = journal
        super().__init__(*args)  # serves the connection

    def routes(self) -> Mapping[str, Methods]:
        files = {path: {"GET": partial(self._send_file, *file)} for path, file in FILES.items()}
        switches = {
            f"{OWN}providers/{provider.port}": {"PUT": partial(self.switch, provider)}
            for provider in self._journal.providers
        }
        return {
            **super().routes(),
            **files,
            "/": {**files["/"], "POST": self.take_message},
            **switches,
            f"{OWN}state": {"GET": lambda: self.reply(200, self._journal.state())},
            f"{OWN}notifications": {"POST": self._send, "DELETE": self._clear_all},
        }

    def methods(self) -> Methods | None:
        if self.path.startswith(OWN):
            return self.routes().get(self.path.partition("?")[0])
        return super().methods()

    def takes_any_host(self) -> bool:
        return super().takes_any_host() and not self.path.startswith(OWN)

    def _send_file(self, name: str, kind: str) -> None:
        content = (FOLDER / name).read_bytes()
        self.send_content(200, content, kind, **{"Content-Security-Policy": POLICY})

    def _send(self) -> None:
        if (fields := self.read_json()) is None:
            return
        try:
            answer = self._journal.send(str(fields.get("recipient", "")), fields)
        except UnicodeEncodeError:
            self.send_error(422, "recipient has to be valid Unicode")
        except ServiceUnreachable:
            self.send_error(502, f"no answer from the service at {self._journal.service}")
        else:
            self.reply(200, answer)

    def _clear_all(self) -> None:
        self._journal.clear()
        self.reply(200, {"message": "cleared"})


class _BesideHandler(ProviderHandler):
    """Another provider's endpoint; its root redirects to the page."""

    def __init__(self, page_port: int, *args: Any) -> None:
        self._page_port = page_port
        super().__init__(*args)  # serves the connection

    def routes(self) -> Mapping[str, Methods]:
        return {**super().routes(), "/": {"GET": self._redirect, "POST": self.take_message}}

    def _redirect(self) -> None:
        """Redirect to the page by the host name that the client used."""
        used = urlsplit(f"//{self.headers.get('Host', '127.0.0.1')}").hostname or ""
        host = f"[{used}]" if ":" in used else used
        location = f"http://{host}:{self._page_port}/"
        self.send_content(303, b"", "text/plain", Location=location)
