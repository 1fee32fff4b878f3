"""How a connection is made: look-up, connect, a proxy's tunnel, TLS, each failure by its name."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import certifi
import requests

from notifier.environ import trust
from notifier.errors import Fault, TransportError
from notifier.single_flight import SingleFlight
from notifier.wire import streams
from notifier.wire.exchange import Connection
from notifier.wire.proxies import Place, Proxy, open_tunnel
from notifier.wire.streams import TLS, Address, Budget, Overlong, Stream


class Connector:
    """Makes connections to providers.

    Args:
        ca_bundle: PEM file or folder of trusted authorities, None for certifi's.
    """

    def __init__(self, ca_bundle: str | None) -> None:
        self._ca_bundle = ca_bundle
        self._look_ups: SingleFlight[tuple[str, int], list[Address]] = SingleFlight("look-up")

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """The one context; reading the authorities takes as long as a hundred notifications."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust(context, self._ca_bundle or certifi.where())
        return context

    def connect(self, budget: Budget, place: Place, proxy: Proxy | None) -> Connection:
        """Return a new connection to `place`, by way of `proxy` if there is one.

        Raises:
            TransportError: there is none.
        """
        addresses = self._resolve(budget, proxy.place if proxy else place)
        with failing_as(Fault.CONNECT):
            plain = streams.connect(budget, addresses)
        stream: Stream = plain
        try:
            if proxy and proxy.place.is_tls:
                stream = self._encrypt(budget, stream, proxy.place)
            if proxy and place.is_tls:
                with failing_as(Fault.CONNECT):
                    open_tunnel(budget, stream, proxy.credentials, place)
            if place.is_tls:
                stream = self._encrypt(budget, stream, place)
        except BaseException:
            plain.close()
            raise
        return Connection(stream, plain)

    def _encrypt(self, budget: Budget, stream: Stream, place: Place) -> Stream:
        budget.begin_phase()
        with failing_as(Fault.TLS):
            return TLS(budget, stream, self._tls, place.name)

    def _resolve(self, budget: Budget, place: Place) -> list[Address]:
        host, port = place.name, place.port
        with failing_as(Fault.DNS):
            try:
                return streams.look_up(host, port, socket.AI_NUMERICHOST)
            except socket.gaierror:  # no address but a name
                return self._look_ups.run(
                    (host, port), lambda: streams.look_up(host, port), budget.time_left()
                )


@contextmanager
def failing_as(fault: Fault) -> Iterator[None]:
    """Turn what the libraries raise in the block into a TransportError."""
    try:
        yield
    except (requests.RequestException, OSError, Overlong, ValueError) as error:
        raise TransportError(fault) from error
