"""Sends POST requests to providers, over kept or new connections."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter

from notifier.errors import Fault, TransportError
from notifier.models import DEFAULT_PORTS
from notifier.wire.connector import Connector, failing_as
from notifier.wire.exchange import STATUS_ONLY, Answer, Connection, Wanted
from notifier.wire.proxies import Origin, Proxies, Proxy
from notifier.wire.streams import Budget

# Maximum number of URLs whose route is cached.
ROUTES = 100


class Transport:
    """Sends POST requests to providers. One per worker, made after the fork; thread-safe.

    Args:
        ca_bundle: PEM file, or folder, of trusted CA certificates; None for certifi's.
        proxies: proxy URLs by scheme, and the exceptions under `no`, as `variables.proxies`
            returns them.
        connections: idle connections to keep per endpoint.
    """

    def __init__(
        self, ca_bundle: str | None, proxies: Mapping[str, str], connections: int, user_agent: str
    ) -> None:
        self._session = requests.Session()
        self._session.trust_env = False
        adapter = WireAdapter(
            Connector(ca_bundle), Proxies(proxies), connections=connections, user_agent=user_agent
        )
        for scheme in DEFAULT_PORTS:
            self._session.mount(f"{scheme}://", adapter)

    def close(self) -> None:
        """Close the idle connections."""
        self._session.close()

    def post(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        deadline: float,
        wanted: Wanted = STATUS_ONLY,
    ) -> Answer:
        """Send a POST and return the answer; redirects are not followed.

        Args:
            headers: header fields of this request, including its content type.
            deadline: on `time.monotonic()`, for everything from the DNS look-up to the last byte.
            wanted: parts of the answer to return besides the status.

        Raises:
            TransportError: no status line was received.
        """
        request = _Request(_Post(url, body, headers, deadline, wanted))
        try:
            response = self._session.send(
                request, stream=True, allow_redirects=False, proxies=_NO_PROXIES
            )
        except requests.exceptions.InvalidSchema as error:  # neither http nor https
            raise TransportError(Fault.URL) from error
        headers = dict(response.headers) if wanted.headers else {}
        return Answer(response.status_code, headers, response.content if wanted.body else None)


# Without this argument, requests would resolve proxies itself for each request.
_NO_PROXIES: dict[str, str] = {}


class _Post(NamedTuple):
    url: str
    body: bytes
    headers: Mapping[str, str]
    deadline: float
    wanted: Wanted


class _Request(requests.PreparedRequest):
    """Carries a `_Post` through requests to the adapter."""

    def __init__(self, post: _Post) -> None:
        super().__init__()
        self.post = post
        self.method, self.url, self.body = "POST", post.url, post.body
        self.headers = post.headers  # type: ignore[assignment]


class Route(NamedTuple):
    """The peer for a URL, the head shared by its requests, and its idle connections."""

    origin: Origin
    proxy: Proxy | None
    head: bytes
    idle: deque[Connection]


class WireAdapter(BaseAdapter):
    """requests' extension point: sends each request over one of our own connections.

    Shared between threads: the deques of idle connections, whose single operations are atomic;
    `_lock` guards the dict of deques.
    """

    def __init__(
        self, connector: Connector, proxies: Proxies, *, connections: int, user_agent: str
    ) -> None:
        super().__init__()
        self._connector, self._proxies = connector, proxies
        self._connections, self._user_agent = connections, user_agent
        self._lock = threading.Lock()
        self._idle: dict[object, deque[Connection]] = {}
        self._route = lru_cache(ROUTES)(self._find_route)

    def close(self) -> None:
        """Close the idle connections."""
        self._route.cache_clear()
        self._close_idle()

    def _close_idle(self) -> bool:
        """Close the idle connections; return True if there were any."""
        with self._lock:
            idle = [connection for kept in self._idle.values() for connection in _emptied(kept)]
        for connection in idle:
            connection.close()
        return bool(idle)

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Send a `_Request`; if it never arrived, resend it over another connection.

        Raises:
            TransportError: no status line was received.
        """
        post = cast("_Request", request).post
        route = self._route(post.url)
        message, budget, answer = _message(route.head, post), Budget(post.deadline), None
        while answer is None:
            connection = self._take(route.idle) or self._connect(budget, route)
            answer = connection.post(budget, message, post.wanted)
            if connection.reusable:
                self._keep(route.idle, connection)
        return _response(request, answer)

    def _connect(self, budget: Budget, route: Route) -> Connection:
        """Return a new connection; if descriptors or ports are short, free the idle ones first."""
        try:
            return self._connector.connect(budget, route.origin, route.proxy)
        except TransportError as error:
            if error.fault is not Fault.SHORTAGE or not self._close_idle():
                raise
        return self._connector.connect(budget, route.origin, route.proxy)

    def _take(self, idle: deque[Connection]) -> Connection | None:
        now = time.monotonic()
        with suppress(IndexError):  # no idle connection is left
            while True:
                connection = idle.pop()  # the most recently used
                if connection.is_fresh(now) and connection.is_quiet():
                    return connection
                connection.close()
        return None

    def _keep(self, idle: deque[Connection], connection: Connection) -> None:
        _close_stale(idle)
        if len(idle) < self._connections:
            idle.append(connection)
        else:
            connection.close()

    def _find_route(self, url: str) -> Route:
        """Return the route to `url`.

        Raises:
            TransportError: the URL, or its proxy's URL, cannot be used.
        """
        with failing_as(Fault.URL):
            prepared = requests.Request("POST", url).prepare()
            url = prepared.url or url
            origin = Origin.of(url)
        with failing_as(Fault.PROXY):
            proxy = self._proxies.of(url)
        with failing_as(Fault.URL):
            head = self._head(prepared, url, None if origin.is_tls else proxy)
        return Route(origin, proxy, head, self._idle_of((origin, proxy)))

    def _head(self, prepared: requests.PreparedRequest, url: str, proxy: Proxy | None) -> bytes:
        """Return the head shared by all requests to `url`; a proxy needs the absolute URL."""
        target = requests.utils.urldefragauth(url) if proxy else prepared.path_url
        lines = [
            f"POST {target} HTTP/1.1",
            f"Host: {_host_field(url)}",
            f"User-Agent: {self._user_agent}",
            "Accept: */*",
        ]
        if "Authorization" in prepared.headers:  # from the URL's user and password
            lines.append(f"Authorization: {prepared.headers['Authorization']!s}")
        if proxy:
            lines += proxy.credentials.splitlines()
        return "\r\n".join([*lines, ""]).encode("latin-1")

    def _idle_of(self, key: object) -> deque[Connection]:
        """Return the idle connections for `key`; close stale connections of all keys."""
        with self._lock:
            for idle in self._idle.values():
                _close_stale(idle)
            return self._idle.setdefault(key, deque())


def _emptied(idle: deque[Connection]) -> Iterator[Connection]:
    """Yield the connections that it takes out of `idle`."""
    with suppress(IndexError):  # empty, or another thread was faster
        while True:
            yield idle.pop()


def _close_stale(idle: deque[Connection]) -> None:
    now = time.monotonic()
    with suppress(IndexError):  # empty, or another thread was faster
        while not idle[0].is_fresh(now):
            idle.popleft().close()


def _host_field(url: str) -> str:
    """Return the value of the Host field, without a default port and user info."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2].removesuffix(f":{DEFAULT_PORTS[parts.scheme]}")


def _message(head: bytes, post: _Post) -> bytes:
    """Return the bytes of a request.

    Raises:
        TransportError: a header field contains a line break, or characters outside Latin-1.
    """
    fields = "".join([f"{name}: {value}\r\n" for name, value in post.headers.items()])
    if not fields.count("\r") == fields.count("\n") == len(post.headers):
        raise TransportError(Fault.URL)
    rest = f"{fields}Content-Length: {len(post.body)}\r\n\r\n"
    try:
        return head + rest.encode("latin-1") + post.body
    except UnicodeEncodeError:
        raise TransportError(Fault.URL) from None


def _response(request: requests.PreparedRequest, answer: Answer) -> requests.Response:
    response = requests.Response()
    response.request, response.url = request, request.url or ""
    response.status_code = answer.status
    if answer.headers:
        response.headers.update(answer.headers)
        response.headers.pop("location", None)  # otherwise requests prepares a redirect
    response.raw = None if answer.body is None else BytesIO(answer.body)
    return response
