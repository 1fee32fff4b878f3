"""How a POST goes out: one requests session per worker, its connections bounded by `exchange`."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from http.cookiejar import DefaultCookiePolicy
from ipaddress import ip_address, ip_network
from typing import Any
from urllib import request as urllib_request

import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import parse_url
from urllib3.util.ssl_ import create_urllib3_context

from notifier import exchange
from notifier.errors import TransportError
from notifier.exchange import Address, Exchange
from notifier.logs import causes
from notifier.settings import trust
from notifier.single_flight import SingleFlight

# The most that is read of an answer's body. It says nothing that counts; a connection whose answer
# has been read can be used again.
DRAIN_BYTES = 64 * 1024

# Hosts whose idle connections are kept. Beyond that the least recently used host loses its own.
POOLED_HOSTS = 100


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


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """Say that nothing redirects: requests reads a redirect's whole body even unfollowed."""


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
        self._session = _Session()
        self._session.trust_env = False  # no netrc, and no environment read for each request
        self._session.cookies = RequestsCookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers["User-Agent"] = user_agent
        adapter = _Adapter(tls_context(ca_bundle), connections)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def close(self) -> None:
        """Close the idle connections."""
        self._session.close()

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        """Return the status of the answer to a POST; redirects are not followed.

        Args:
            deadline: on `time.monotonic()`; holds for everything from the look-up to the last byte.

        Raises:
            TransportError: there was no status line; its kind says how far the exchange came.
        """
        current = Exchange(deadline, self._resolve)
        with current.under_way(), _no_library_errors(current):
            self._post(current, url, body, headers)
        if current.status is None:
            raise TransportError("protocol")
        return current.status

    def _post(self, current: Exchange, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        response = self._session.post(
            url,
            data=body,
            headers=headers,
            proxies=self._proxies_for(url),
            allow_redirects=False,
            stream=True,
        )
        with response:
            current.status = response.status_code
            if int(response.headers.get("Content-Length", 0)) <= DRAIN_BYTES:
                response.raw.read(DRAIN_BYTES + 1, decode_content=False)

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
    """Turn what requests, urllib3 and http.client raise into a TransportError, unless the status
    line has arrived: it decides, however the rest of the answer went."""
    try:
        yield
    except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as error:
        if current.status is None:
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
