"""The addresses to listen on, as gunicorn's setting `bind` takes them."""

import functools
import socket
import sys
from typing import Any

ALL_IPV4, ALL = "0.0.0.0", "::"  # noqa: S104 the service is for other machines

_MAPPED = "::ffff:"  # begins an IPv4 caller's address on a socket for both families


@functools.cache  # if a reload changed them, gunicorn would bind again and find the port in use
def addresses(host: str | None, port: int) -> list[str]:
    """Return the addresses that make `port` answer on `host`, or everywhere.

    An IPv6 socket for all addresses accepts IPv4 as well, unless the system says otherwise (Linux:
    net.ipv6.bindv6only). gunicorn keeps the system's default.

    Raises:
        SystemExit: this machine has no such address.
    """
    if host:
        try:
            _is_ipv6_only(host)
        except OSError as error:
            sys.exit(
                f'notifier cannot start: HTTP_SERVER_HOST is "{host}": '
                f"expected an address of this machine ({error.strerror})"
            )
        return [_joined(host, port)]
    try:
        hosts = [ALL_IPV4, ALL] if _is_ipv6_only(ALL) else [ALL]
    except OSError:  # no IPv6
        hosts = [ALL_IPV4]
    return [_joined(each, port) for each in hosts]


def _is_ipv6_only(host: str) -> bool:
    """Return True if a socket on `host` accepts IPv6 only.

    Raises:
        OSError: a socket cannot be bound to `host`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        if family == socket.AF_INET:
            return False
        return bool(probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def plain(client: Any) -> Any:
    """Return a caller's address; an IPv4 address in IPv6 form becomes IPv4 again.

    Args:
        client: as `socket.accept` returns it; a Unix socket's is a string.
    """
    if isinstance(client, tuple) and client[0].startswith(_MAPPED):
        return client[0].removeprefix(_MAPPED), client[1]
    return client
