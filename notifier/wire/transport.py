"""How a POST goes out: one requests adapter per worker, its connections bounded by `exchange`."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from ipaddress import ip_address, ip_network
from typing import Any
from urllib import request as urllib_request
from urllib.parse import urlsplit

import certifi
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Timeout, parse_url
from urllib3.util.ssl_ import create_urllib3_context

from notifier.environ import trust
from notifier.errors import TransportError
from notifier.logs import causes
from notifier.models import DEFAULT_PORTS
from notifier.single_flight import SingleFlight
from notifier.wire import exchange
from notifier.wire.exchange import Address, Exchange
from notifier.wire.watchdog import Watchdog

# Hosts whose idle connections are kept. Beyond that one host loses its own.
POOLED_HOSTS = 100

# For requests: the sockets know what is left of the exchange's time. Made once.
_UNBOUNDED: Any = Timeout(None)


class _Request(requests.PreparedRequest):
    """A prepared request that knows the pool of its connections and its target in the first line.

    requests would work both out for every request, and much else that is the same for all requests
    to a URL: they are copies of one that it has prepared.
    """

    pool: Any
    target: str

    @property
    def over_tls(self) -> bool:
        return (self.url or "").startswith("https:")

    def with_body(self, body: bytes, headers: Mapping[str, str]) -> "_Request":
        """Return a request of this kind with `body`, and `headers` besides its own."""
        request = _Request()
        request.method, request.url, request.body = self.method, self.url, body
        request.pool, request.target = self.pool, self.target
        length = {"Content-Length": str(len(body))}
        request.headers = {**self.headers, **headers, **length}  # type: ignore[assignment]
        return request


class _Adapter(HTTPAdapter):
    """requests' adapter with bounded connections and one TLS context for all of them."""

    def __init__(self, context: ssl.SSLContext, connections: int) -> None:
        self._context = context
        super().__init__(pool_connections=POOLED_HOSTS, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = exchange.POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        kwargs |= {"ssl_context": self._context, "proxy_ssl_context": self._context}
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = exchange.POOLS
        return manager

    def close(self) -> None:
        """Close the idle connections now, not when the garbage collector comes to their pools."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 it can't be iterated
                manager.pools[key].close()
        super().close()

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Leave the connection alone: the context verifies, and has read its CA bundle once."""

    def prepared(self, url: str, headers: Mapping[str, str], proxies: dict[str, str]) -> _Request:
        """Return what is the same for all requests to `url`."""
        request = _Request()
        request.prepare("POST", url, headers)
        request.pool = super().get_connection_with_tls_context(request, True, proxies=proxies)
        request.headers["Host"] = _host_field(request.url or "")
        request.target = super().request_url(request, proxies)
        return request

    def get_connection_with_tls_context(self, request: Any, *_: Any, **__: Any) -> Any:
        return request.pool

    def request_url(self, request: Any, proxies: Any) -> Any:
        return request.target

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.request = resp.status, req
        return response


def _host_field(url: str) -> str:
    """Return the host as a request names it: without a default port, without a user's name."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2].removesuffix(f":{DEFAULT_PORTS[parts.scheme]}")


def tls_context(ca_bundle: str | None) -> ssl.SSLContext:
    """Return a context that verifies against the file or folder `ca_bundle`, else certifi's."""
    context = create_urllib3_context()
    context.sslsocket_class = exchange.BoundedTLSSocket
    trust(context, ca_bundle or certifi.where())
    return context


class Transport:
    """Posts to providers. One per worker, made after the fork; its methods may run in any thread.

    Args:
        ca_bundle: PEM file or folder of trusted authorities, None for certifi's.
        proxies: proxy URL by scheme and the exceptions under `no`, as
            `urllib.request.getproxies_environment` returns them.
        connections: idle connections to keep per host.
    """

    def __init__(
        self, ca_bundle: str | None, proxies: Mapping[str, str], connections: int, user_agent: str
    ) -> None:
        self._proxies = dict(proxies)
        self._look_ups: SingleFlight[tuple[str, int], list[Address]] = SingleFlight("look-up")
        self._headers = {
            "User-Agent": user_agent,
            "Content-Type": "application/json",
            "Accept": "*/*",
        }
        self._adapter = _Adapter(tls_context(ca_bundle), connections)
        self._watchdog = Watchdog()
        self._prepared = lru_cache(POOLED_HOSTS)(self._prepare)

    def close(self) -> None:
        """Close the idle connections."""
        self._adapter.close()
        self._watchdog.close()

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        """Return the status of the answer to a POST; redirects are not followed.

        Args:
            body: JSON.
            deadline: on `time.monotonic()`; holds for everything from the look-up to the last byte.

        Raises:
            TransportError: there was no status line; its kind says how far the exchange came.
        """
        current = Exchange(deadline, self._resolve)
        with current.under_way(), _no_library_errors(current):
            request = self._prepared(url).with_body(body, headers)
            if not request.over_tls:
                return self._send(request, current)
            with self._watchdog.watching(current):
                return self._send(request, current)

    def _send(self, request: _Request, current: Exchange) -> int:
        """Return the status; what nobody has read is sent again, at last over a new connection."""
        while True:
            current.unread = False
            try:
                return self._adapter.send(request, timeout=_UNBOUNDED).status_code
            except requests.ConnectionError:
                if not current.unread:
                    raise

    def _prepare(self, url: str) -> _Request:
        return self._adapter.prepared(url, self._headers, self._proxies_for(url))

    def _resolve(self, host: str, port: int, seconds: float) -> list[Address]:
        def look_up() -> list[Address]:
            return exchange.look_up(host, port)

        return self._look_ups.run((host, port), look_up, seconds)

    def _proxies_for(self, url: str) -> dict[str, str]:
        if not self._proxies or _bypasses(parse_url(url).host or "", self._proxies):
            return {}
        return self._proxies


def _bypasses(host: str, proxies: dict[str, str]) -> bool:
    """Say whether `no_proxy` names `host`, or a network in CIDR notation that it lies in."""
    if urllib_request.proxy_bypass_environment(host, proxies):  # type: ignore[attr-defined]
        return True
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    return any(address in network for network in _networks(proxies.get("no", "")))


def _networks(no_proxy: str) -> Iterator[Any]:
    for entry in no_proxy.split(","):
        try:
            yield ip_network(entry.strip(), strict=False)
        except ValueError:
            continue


@contextmanager
def _no_library_errors(current: Exchange) -> Iterator[None]:
    """Turn what requests, urllib3 and http.client raise into a TransportError."""
    try:
        yield
    except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as error:
        raise TransportError(_kind(error, current.stage)) from error


def _kind(error: BaseException, stage: str) -> str:
    if isinstance(error, requests.exceptions.InvalidURL | LocationParseError) or stage == "url":
        return "url"
    if stage != "sent":
        return "connect" if stage == "tunnel" else stage
    chain = list(causes(error))
    if any(isinstance(link, TimeoutError) for link in chain):
        return "timeout"
    if any(isinstance(link, ConnectionError | ssl.SSLEOFError) for link in chain):
        return "reset"
    return "protocol"
