"""Connects to providers: DNS look-up, TCP connect, proxy tunnel, TLS.

Each failure is a `TransportError` whose `fault` names the step.
"""

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import certifi
import requests

from notifier.environ import trust
from notifier.errors import Fault, TransportError, is_shortage
from notifier.single_flight import SingleFlight
from notifier.wire import streams
from notifier.wire.exchange import Connection, Malformed
from notifier.wire.proxies import Origin, Proxy, open_tunnel
from notifier.wire.streams import TLS, Address, Budget, Overlong, Plain, Stream

_EXPECTED = (requests.RequestException, OSError, MemoryError, Overlong, Malformed, ValueError)


class Connector:
    """Makes connections to providers.

    Args:
        ca_bundle: PEM file, or folder, of trusted CA certificates; None for certifi's.
    """

    def __init__(self, ca_bundle: str | None) -> None:
        self._ca_bundle = ca_bundle
        self._lock = threading.Lock()  # guards the creation of _context
        self._context: ssl.SSLContext | None = None
        self._look_ups: SingleFlight[tuple[str, int], list[Address]] = SingleFlight("look-up")

    def connect(self, budget: Budget, origin: Origin, proxy: Proxy | None) -> Connection:
        """Return a new connection to `origin`, through `proxy` if there is one.

        Raises:
            TransportError: the connection could not be made.
        """
        if proxy is None:
            return Connection(*self._reach(budget, origin))
        with blaming_the_proxy():
            stream, plain = self._reach(budget, proxy.origin)
        if origin.is_tls:
            with closed_on_failure(plain):
                with blaming_the_proxy(), failing_as(Fault.CONNECT):
                    open_tunnel(budget, stream, proxy.credentials, origin)
                stream = self._encrypt(budget, stream, origin)
        return Connection(stream, plain)

    def _reach(self, budget: Budget, origin: Origin) -> tuple[Stream, Plain]:
        """Return a stream directly to `origin`, over TLS if its scheme is https, and its socket."""
        with failing_as(Fault.DNS):
            addresses = self._resolve(budget, origin)
        with failing_as(Fault.CONNECT):
            plain = streams.connect(budget, addresses)
        if not origin.is_tls:
            return plain, plain
        with closed_on_failure(plain):
            return self._encrypt(budget, plain, origin), plain

    def _encrypt(self, budget: Budget, stream: Stream, origin: Origin) -> Stream:
        budget.begin_phase()
        with failing_as(Fault.TLS):
            return TLS(budget, stream, self._tls_context(), origin.name)

    def _tls_context(self) -> ssl.SSLContext:
        """Return the TLS context that all connections share; create it at the first https call.

        Loading the CA certificates takes as long as a hundred notifications.
        """
        with self._lock:
            if self._context is None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                trust(context, self._ca_bundle or certifi.where())
                self._context = context
            return self._context

    def _resolve(self, budget: Budget, origin: Origin) -> list[Address]:
        host, port = origin.name, origin.port
        try:
            return streams.look_up(host, port, socket.AI_NUMERICHOST)
        except socket.gaierror:  # a name, not an address
            return self._look_ups.run(
                (host, port), lambda: streams.look_up(host, port), budget.time_left()
            )


@contextmanager
def failing_as(fault: Fault) -> Iterator[None]:
    """Convert library errors raised in the block to a `TransportError` with `fault`.

    Its fault is `SHORTAGE` instead if this machine lacked a resource.
    """
    try:
        yield
    except _EXPECTED as error:
        if shortage := _shortage(error):
            raise TransportError(Fault.SHORTAGE) from shortage
        raise TransportError(fault) from error


def _shortage(error: Exception) -> Exception | None:
    """Return the shortage that caused `error`, or None."""
    if is_shortage(error):
        return error
    if isinstance(error, socket.gaierror | ssl.SSLError):
        # Without a free descriptor glibc finds no name, and OpenSSL no authority in a folder.
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as lack:
            return lack
    return None


@contextmanager
def blaming_the_proxy() -> Iterator[None]:
    """Convert a `TransportError` raised in the block to one whose fault is the proxy's."""
    try:
        yield
    except TransportError as error:
        if error.fault is Fault.SHORTAGE:
            raise
        raise TransportError(Fault.PROXY) from error.__cause__


@contextmanager
def closed_on_failure(plain: Plain) -> Iterator[None]:
    """Close `plain` if the block fails."""
    try:
        yield
    except BaseException:
        plain.close()
        raise
