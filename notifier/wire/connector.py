"""Connects to providers: DNS look-up, TCP connect, proxy tunnel, TLS.

Each failure is a `TransportError` whose `fault` names the step.
"""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import certifi
import requests

from notifier.environ import trust
from notifier.errors import Fault, TransportError
from notifier.single_flight import SingleFlight
from notifier.wire import streams
from notifier.wire.exchange import Connection, Malformed
from notifier.wire.proxies import Origin, Proxy, open_tunnel
from notifier.wire.streams import TLS, Address, Budget, Overlong, Stream


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
        addresses = self._resolve(budget, proxy.origin if proxy else origin)
        with failing_as(Fault.CONNECT):
            plain = streams.connect(budget, addresses)
        stream: Stream = plain
        try:
            if proxy and proxy.origin.is_tls:
                stream = self._encrypt(budget, stream, proxy.origin)
            if proxy and origin.is_tls:
                with failing_as(Fault.CONNECT):
                    open_tunnel(budget, stream, proxy.credentials, origin)
            if origin.is_tls:
                stream = self._encrypt(budget, stream, origin)
        except BaseException:
            plain.close()
            raise
        return Connection(stream, plain)

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
        with failing_as(Fault.DNS):
            try:
                return streams.look_up(host, port, socket.AI_NUMERICHOST)
            except socket.gaierror:  # a name, not an address
                return self._look_ups.run(
                    (host, port), lambda: streams.look_up(host, port), budget.time_left()
                )


@contextmanager
def failing_as(fault: Fault) -> Iterator[None]:
    """Convert library errors raised in the block to a `TransportError` with `fault`."""
    try:
        yield
    except (requests.RequestException, OSError, Overlong, Malformed, ValueError) as error:
        raise TransportError(fault) from error
