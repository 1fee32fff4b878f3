"""Chooses the proxy for a URL, and opens a tunnel through it."""

import errno
from base64 import b64encode
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib import request as urllib_request

import requests
from urllib3.util import parse_url

from notifier.models import DEFAULT_PORTS
from notifier.variables import ProxyUrl
from notifier.wire.exchange import Head
from notifier.wire.streams import Budget, Stream


class Origin(NamedTuple):
    """The scheme, host and port of a URL; `host` is a name or an address, IPv6 in brackets."""

    is_tls: bool
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Origin":
        """Return the origin of an http or https URL.

        Raises:
            ValueError: `url` is not an http or https URL.
        """
        parts = parse_url(url)
        if parts.scheme not in DEFAULT_PORTS or not parts.host:
            raise ValueError("expected an http or https URL")
        return cls(parts.scheme == "https", parts.host, parts.port or DEFAULT_PORTS[parts.scheme])

    @property
    def name(self) -> str:
        """The host without brackets, as sockets and certificates need it."""
        return self.host.strip("[]")


class Proxy(NamedTuple):
    """A proxy; `credentials` is its Proxy-Authorization line, empty if it needs none."""

    origin: Origin
    credentials: str

    @classmethod
    def of(cls, url: str) -> "Proxy":
        """Return the proxy at `url`, parsed by the function that checks the variables at the start.

        Raises:
            ValueError: `url` cannot be used.
        """
        is_tls, host, port, credentials = ProxyUrl.of(url)
        origin = Origin(is_tls, host, port or DEFAULT_PORTS["https" if is_tls else "http"])
        if not credentials:
            return cls(origin, "")
        encoded = b64encode(credentials.encode("latin-1")).decode()
        return cls(origin, f"Proxy-Authorization: Basic {encoded}\r\n")


class Proxies:
    """The proxies that the environment configures.

    Args:
        by_scheme: as `variables.proxies` returns them.
    """

    def __init__(self, by_scheme: Mapping[str, str]) -> None:
        self._by_scheme = dict(by_scheme)
        self._networks = list(_networks(self._by_scheme.get("no", "")))

    def of(self, url: str) -> Proxy | None:
        """Return the proxy for `url`, or None to connect directly.

        Raises:
            ValueError: the proxy's URL cannot be used.
        """
        if not self._by_scheme or self._is_exempt(parse_url(url).host or ""):
            return None
        proxy_url = requests.utils.select_proxy(url, self._by_scheme)
        return Proxy.of(proxy_url) if proxy_url else None

    def _is_exempt(self, host: str) -> bool:
        """Return True if `no` lists `host`, or a CIDR network that contains it."""
        if urllib_request.proxy_bypass_environment(host, self._by_scheme):  # type: ignore[attr-defined]
            return True
        try:
            address = ip_address(host.strip("[]"))
        except ValueError:
            return False
        return any(address in network for network in self._networks)


def _networks(no_proxy: str) -> Iterator[IPv4Network | IPv6Network]:
    for entry in no_proxy.split(","):
        try:
            yield ip_network(entry.strip(), strict=False)
        except ValueError:
            continue


def open_tunnel(budget: Budget, stream: Stream, credentials: str, origin: Origin) -> None:
    """Ask the proxy at the other end of `stream` for a tunnel to `origin`.

    Raises:
        OSError: the proxy refused, or the connection failed.
        Overlong: the proxy's answer is too long.
        Malformed: the proxy's answer is malformed.
    """
    target = f"{origin.host}:{origin.port}"
    request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{credentials}\r\n"
    budget.begin_phase()
    stream.send(budget, request.encode("latin-1"))
    head = Head(stream)
    status, _ = head.status_line(budget)
    if status != HTTPStatus.OK:
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"the proxy answered {status}")
    head.pass_fields(budget)
