"""One bounded HTTP exchange, name look-up included, over pooled connections.

requests and urllib3 bound single socket operations: a peer that sends a byte a second is never
late, each resolved address gets the full connect time-out, and a name look-up has no bound at all.
Here one deadline holds for the whole exchange: its sockets set what is left before each operation.
"""

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from http.client import BadStatusLine, HTTPException, HTTPResponse, parse_headers
from http.cookiejar import DefaultCookiePolicy
from ipaddress import ip_address, ip_network
from typing import Any
from urllib import request as urllib_request

import certifi
import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError, NewConnectionError
from urllib3.util import parse_url
from urllib3.util.ssl_ import create_urllib3_context

from notifier.errors import TransportError
from notifier.settings import trust
from notifier.single_flight import SingleFlight

# What may be spent on an answer once its status line is known. The rest of the answer changes
# nothing; it is read only so that the connection can be used again.
DRAIN_BYTES = 64 * 1024
DRAIN_SECONDS = 1.0

# Hosts whose idle connections are kept. Beyond that the least recently used host loses its own.
POOLED_HOSTS = 100

_Address = tuple[Any, Any, int, str, Any]
_LookUps = SingleFlight[tuple[str, int], list[_Address]]


@dataclass(slots=True)
class _Exchange:
    """What the sockets of one exchange share. Used by one thread only."""

    deadline: float  # time.monotonic()
    look_ups: _LookUps
    stage: str = "url"  # how far it came: then dns, connect, tunnel (a proxy's), tls, sent
    status: int | None = None

    def time_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline of the exchange has passed")
        return left

    def sending(self) -> float:
        """Note that the provider is sent something, unless it is a proxy; return the time left."""
        if self.stage != "tunnel":
            self.stage = "sent"
        return self.time_left()

    def status_arrived(self, status: int) -> None:
        self.status = status
        self.deadline = min(self.deadline, time.monotonic() + DRAIN_SECONDS)

    def connect(self, host: str, port: int) -> socket.socket:
        """Return a socket connected to the first address of `host` that answers.

        Each address gets its share of the time that is left.
        """
        self.stage = "dns"
        addresses = self._resolve(host, port)
        self.stage = "connect"
        for addresses_left in range(len(addresses), 0, -1):
            *how, _, address = addresses[-addresses_left]
            try:
                return _connected(how, address, self.time_left() / addresses_left)
            except OSError:
                if addresses_left == 1:
                    raise
        raise OSError("the name has no address")

    def _resolve(self, host: str, port: int) -> list[_Address]:
        try:
            return _look_up(host, port, socket.AI_NUMERICHOST)
        except socket.gaierror:  # no address but a name
            return self.look_ups.run((host, port), lambda: _look_up(host, port), self.time_left())


def _look_up(host: str, port: int, flags: int = 0) -> list[_Address]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)


def _connected(how: list[Any], address: Any, seconds: float) -> socket.socket:
    sock = _BoundedSocket(*how)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


# Sockets and connections are made deep inside urllib3; this is how they find their exchange.
_exchange: ContextVar[_Exchange] = ContextVar("exchange")


class _BoundedSocket(socket.socket):
    """A socket whose every operation ends at the deadline of the exchange it serves."""

    def recv(self, *args: Any) -> bytes:
        self.settimeout(_exchange.get().time_left())
        return super().recv(*args)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_exchange.get().time_left())
        return super().recv_into(*args)

    def send(self, *args: Any) -> int:
        self.settimeout(_exchange.get().sending())
        return super().send(*args)

    def sendall(self, *args: Any) -> None:
        # A plain socket's time-out is for the whole of sendall(); a TLS one loops over send().
        self.settimeout(_exchange.get().sending())
        super().sendall(*args)


class _BoundedTLSSocket(_BoundedSocket, ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        exchange = _exchange.get()
        exchange.stage = "tls"
        self.settimeout(exchange.time_left())
        super().do_handshake(block)


class _StatusFirst(HTTPResponse):
    """Reports its status before it reads the headers, which may never end.

    Interim answers are stepped over, as RFC 9110 section 15.2 has it; http.client knows only 100.
    """

    def _read_status(self) -> tuple[str, int, str]:
        line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
        while line[1] < HTTPStatus.OK:
            if line[1] == HTTPStatus.SWITCHING_PROTOCOLS:
                raise BadStatusLine("nobody asked for another protocol")
            parse_headers(self.fp)
            line = super()._read_status()  # type: ignore[misc]
        exchange = _exchange.get()
        if exchange.stage == "sent":
            exchange.status_arrived(line[1])
        return line


class _Connection(HTTPConnection):
    response_class = _StatusFirst

    def _new_conn(self) -> socket.socket:
        try:
            return _exchange.get().connect(self._dns_host, self.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA refuses
            raise NewConnectionError(self, "no connection") from error

    def _tunnel(self) -> None:
        _exchange.get().stage = "tunnel"
        super()._tunnel()

    def connect(self) -> None:
        super().connect()
        _exchange.get().stage = "connect"  # behind a tunnel it is the provider's turn again


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """requests' adapter with bounded connections and one TLS context for all of them."""

    def __init__(self, context: ssl.SSLContext, connections: int) -> None:
        self._context = context
        super().__init__(pool_connections=POOLED_HOSTS, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        kwargs |= {"ssl_context": self._context, "proxy_ssl_context": self._context}
        manager = super().proxy_manager_for(proxy, **kwargs)
        manager.pool_classes_by_scheme = self.poolmanager.pool_classes_by_scheme
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
    context.sslsocket_class = _BoundedTLSSocket
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
        self._look_ups: _LookUps = SingleFlight("look-up")
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
        exchange = _Exchange(deadline, self._look_ups)
        token = _exchange.set(exchange)
        try:
            with _no_library_errors(exchange):
                self._post(url, body, headers)
        finally:
            _exchange.reset(token)
        if exchange.status is None:
            raise TransportError("protocol")
        return exchange.status

    def _post(self, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        response = self._session.post(
            url,
            data=body,
            headers=headers,
            proxies=self._proxies_for(url),
            allow_redirects=False,
            stream=True,
        )
        with response:
            _exchange.get().status = response.status_code
            if int(response.headers.get("Content-Length", 0)) <= DRAIN_BYTES:
                response.raw.read(DRAIN_BYTES + 1, decode_content=False)

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
def _no_library_errors(exchange: _Exchange) -> Iterator[None]:
    """Turn what requests, urllib3 and http.client raise into a TransportError, unless the status
    line has arrived: it decides, however the rest of the answer went."""
    try:
        yield
    except (requests.RequestException, HTTPError, HTTPException, OSError, ValueError) as error:
        if exchange.status is None:
            raise TransportError(_kind(error, exchange.stage)) from error


def _kind(error: BaseException, stage: str) -> str:
    if isinstance(error, requests.exceptions.InvalidURL | LocationParseError) or stage == "url":
        return "url"
    if stage != "sent":
        return "connect" if stage == "tunnel" else stage
    chain = list(_chain(error))
    if any(isinstance(link, TimeoutError) for link in chain):
        return "timeout"
    if any(isinstance(link, ConnectionError | ssl.SSLEOFError) for link in chain):
        return "reset"
    return "protocol"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__
