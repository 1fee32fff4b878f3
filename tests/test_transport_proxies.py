"""Proxies: used if configured, bypassed for the hosts in `no`, never mistaken for the provider."""

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from notifier.wire import exchange as exchange_module
from notifier.wire import streams
from notifier.wire.transport import Transport
from tests.fixtures import MakeProvider, MakeTransport
from tests.posting import failed, failure, post
from tests.scripted_provider import (
    Peer,
    Received,
    Script,
    ScriptedProvider,
    answer,
    close,
    hang,
    reset,
)
from tests.sockets import LOOPBACK, descriptors_left, refusing, silent

NOWHERE = "http://mail.example.com/send"

Certificate = tuple[Path, ssl.SSLContext]


def connects(peer: Peer, received: Received) -> None:
    """Act as a proxy that opens a tunnel."""
    assert received.method == "CONNECT"
    host, _, port = received.path.rpartition(":")
    peer.tunnel(host, int(port))


@pytest.fixture
def proxy(make_provider: MakeProvider) -> ScriptedProvider:
    return make_provider()


@pytest.fixture
def tunnelled(
    make_transport: MakeTransport, proxy: ScriptedProvider, certificate: Certificate
) -> Transport:
    """A transport that trusts `certificate` and reaches https through `proxy`."""
    proxy.script = connects
    return make_transport(certificate[0], {"https": f"http://{proxy.endpoint}"})


@pytest.fixture
def target(make_provider: MakeProvider, certificate: Certificate) -> ScriptedProvider:
    return make_provider(tls=certificate[1])


def test_http_goes_through_the_proxy_with_an_absolute_url_and_no_local_look_up(
    make_transport: MakeTransport, proxy: ScriptedProvider
) -> None:
    proxy.script = answer(202)
    transport = make_transport(proxies={"http": f"http://{proxy.endpoint}"})
    for _ in range(2):
        assert post(transport, NOWHERE) == 202
    assert [received.path for received in proxy.received] == [NOWHERE] * 2
    assert proxy.received[0].headers["host"] == "mail.example.com"
    assert proxy.connections == 1


@pytest.mark.parametrize("key", ["http", "all"])
@pytest.mark.parametrize("written", ["http://{}", "{}", "http://{}/"])
def test_a_proxy_may_be_written_in_each_form_that_the_environment_allows(
    make_transport: MakeTransport, proxy: ScriptedProvider, key: str, written: str
) -> None:
    assert post(make_transport(proxies={key: written.format(proxy.endpoint)}), NOWHERE) == 200
    assert len(proxy.received) == 1


def test_the_proxy_gets_the_credentials_of_its_url(
    make_transport: MakeTransport, proxy: ScriptedProvider
) -> None:
    transport = make_transport(proxies={"http": f"http://user:pass@{proxy.endpoint}"})
    post(transport, NOWHERE)
    assert proxy.received[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNz"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_environment_is_not_read_for_each_request(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    proxy: ScriptedProvider,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    provider, transport = make_provider(), make_transport()
    monkeypatch.setenv(name, f"http://{proxy.endpoint}")
    post(transport, provider.url)
    assert (len(provider.received), proxy.received) == (1, [])


def test_https_goes_through_a_tunnel_that_is_reused(
    tunnelled: Transport, proxy: ScriptedProvider, target: ScriptedProvider
) -> None:
    target.script = answer(201)
    for _ in range(2):
        assert post(tunnelled, f"https://localhost:{target.port}/send") == 201
    (connect,) = proxy.received
    assert (connect.method, connect.path) == ("CONNECT", f"localhost:{target.port}")
    assert [(got.method, got.path) for got in target.received] == [("POST", "/send")] * 2
    assert proxy.connections == 1


def test_tls_goes_through_a_proxys_tls_over_a_connection_that_is_reused(
    make_transport: MakeTransport, make_provider: MakeProvider, certificate: Certificate
) -> None:
    bundle, context = certificate
    proxy, target = make_provider(connects, tls=context), make_provider(answer(201), tls=context)
    transport = make_transport(bundle, {"https": f"https://{proxy.endpoint}"})
    for _ in range(3):
        assert post(transport, target.url) == 201
    assert (proxy.connections, len(target.received)) == (1, 3)


@pytest.mark.parametrize(
    ("netloc", "host"),
    [
        ("mail.example.com", "mail.example.com"),
        ("mail.example.com:80", "mail.example.com"),
        ("mail.example.com:8080", "mail.example.com:8080"),
        ("user:password@mail.example.com", "mail.example.com"),
        ("[::1]:80", "[::1]"),
    ],
)
def test_the_host_field_has_neither_a_default_port_nor_a_user(
    make_transport: MakeTransport, proxy: ScriptedProvider, netloc: str, host: str
) -> None:
    transport = make_transport(proxies={"http": f"http://{proxy.endpoint}"})
    assert post(transport, f"http://{netloc}/send") == 200
    assert proxy.received[0].headers["host"] == host


BEHIND_A_TUNNEL: dict[str, tuple[Script, str]] = {
    "hangs": (hang, "timeout"),
    "closes": (close, "reset"),
    "drips": (lambda peer, _: peer.drip(b"HTTP/1.1 200 O"), "timeout"),
}


@pytest.mark.parametrize("name", BEHIND_A_TUNNEL)
def test_an_open_tunnel_is_not_taken_for_the_providers_answer(
    tunnelled: Transport, target: ScriptedProvider, name: str
) -> None:
    target.script, kind = BEHIND_A_TUNNEL[name]
    assert failure(tunnelled, target.url) == kind


@pytest.mark.parametrize("status", [202, 503])
def test_the_provider_behind_a_tunnel_has_its_full_time(
    tunnelled: Transport,
    target: ScriptedProvider,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr(exchange_module, "DRAIN_SECONDS", 0.1)

    def answer_slowly(peer: Peer, received: Received) -> None:
        time.sleep(0.4)  # four times DRAIN_SECONDS
        answer(status)(peer, received)

    target.script = answer_slowly
    assert post(tunnelled, target.url) == status


def test_a_provider_of_an_unknown_authority_fails_as_tls_through_a_tunnel_too(
    make_transport: MakeTransport, proxy: ScriptedProvider, target: ScriptedProvider
) -> None:
    proxy.script = connects
    transport = make_transport(proxies={"https": f"http://{proxy.endpoint}"})
    assert failure(transport, target.url, seconds=5) == "tls"
    assert target.received == []


def test_a_tunnel_that_closes_at_once_fails_as_tls(
    tunnelled: Transport, proxy: ScriptedProvider
) -> None:
    def open_and_leave(peer: Peer, _: Received) -> None:
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        peer.close()

    proxy.script = open_and_leave
    assert failure(tunnelled, "https://mail.example.com/") == "tls"


@pytest.mark.parametrize(
    ("head", "opens"),
    [
        (b"HTTP/1.0 200 OK\n\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nVia: x\r\n\r\n", True),
        (b"x 200 OK\r\n\r\n", False),
    ],
)
def test_a_tunnel_opens_only_with_a_valid_200(
    tunnelled: Transport, proxy: ScriptedProvider, head: bytes, opens: bool
) -> None:
    """An open tunnel then fails as TLS, because no provider is behind it."""
    proxy.script = lambda peer, _: (peer.send(head), peer.close())[0]
    assert failure(tunnelled, "https://mail.example.com/") == ("tls" if opens else "proxy")


@pytest.mark.parametrize("script", [close, reset], ids=["closes", "resets"])
def test_a_proxy_that_ends_the_connection_without_an_answer_fails_as_proxy(
    tunnelled: Transport, proxy: ScriptedProvider, script: Script
) -> None:
    proxy.script = script
    assert failure(tunnelled, "https://mail.example.com/") == "proxy"


@pytest.mark.parametrize("status", [301, 403, 407, 429, 502, 503])
def test_a_refused_tunnel_is_not_taken_for_the_providers_answer(
    tunnelled: Transport, proxy: ScriptedProvider, status: int
) -> None:
    """The message has not been sent, and the proxy's status says nothing about the provider."""
    proxy.script = answer(status, b"<html>no</html>")
    assert failed(tunnelled, "https://mail.example.com/") == (
        "proxy",
        f"the proxy answered {status}",
    )


URLS = [NOWHERE, "https://mail.example.com/"]


@pytest.mark.parametrize("url", URLS)
def test_a_proxy_that_refuses_the_connection_fails_as_proxy(
    make_transport: MakeTransport, url: str
) -> None:
    with refusing() as port:
        transport = make_transport(proxies={"all": f"http://{LOOPBACK}:{port}"})
        assert failed(transport, url) == ("proxy", "connection refused")


@pytest.mark.parametrize("url", URLS)
def test_a_proxy_whose_name_does_not_resolve_fails_as_proxy(
    make_transport: MakeTransport, url: str
) -> None:
    transport = make_transport(proxies={"all": "http://proxy.invalid:3128"})
    assert failure(transport, url, seconds=5) == "proxy"


@pytest.mark.parametrize("url", URLS)
def test_a_proxy_of_an_unknown_authority_fails_as_proxy(
    make_transport: MakeTransport, make_provider: MakeProvider, certificate: Certificate, url: str
) -> None:
    proxy = make_provider(tls=certificate[1])
    transport = make_transport(proxies={"all": f"https://{proxy.endpoint}"})
    fault, detail = failed(transport, url, seconds=5)
    assert fault == "proxy"
    assert "certificate verify failed" in str(detail)


@pytest.mark.parametrize("url", URLS)
def test_a_lack_of_descriptors_is_not_blamed_on_the_proxy(
    make_transport: MakeTransport, proxy: ScriptedProvider, url: str
) -> None:
    transport = make_transport(proxies={"all": f"http://{proxy.endpoint}"})
    with descriptors_left(0):
        assert failed(transport, url) == ("shortage", "too many open files")


def test_an_unusable_proxy_is_not_blamed_on_the_providers_url(
    make_transport: MakeTransport,
) -> None:
    assert failure(make_transport(proxies={"all": "http://[proxy"}), NOWHERE) == "proxy"


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_proxy_is_given_up_at_the_deadline(
    make_transport: MakeTransport, scheme: str, url: str
) -> None:
    """Only a plain proxy of a plain URL may have passed on the request."""
    with silent() as port:
        transport = make_transport(proxies={"all": f"{scheme}://{LOOPBACK}:{port}"})
        may_have_it = scheme == "http" and url == NOWHERE
        assert failure(transport, url) == ("timeout" if may_have_it else "proxy")


@pytest.mark.parametrize("url", URLS)
def test_a_proxy_that_drips_over_tls_is_given_up_at_the_deadline(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
) -> None:
    bundle, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))  # OpenSSL's default authorities
    proxy = make_provider(lambda peer, _: peer.drip(b"HTTP/1.1 200 O"), tls=context)
    address = f"https://{proxy.endpoint}"
    assert failure(make_transport(bundle, {"http": address, "https": address}), url)
    assert len(proxy.received) == 1


@pytest.fixture
def everywhere(
    make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ScriptedProvider]:
    """A provider that receives every connection to port 80, whatever the name or address."""
    provider = make_provider()
    real = streams.look_up

    def look_up(host: str, port: int, flags: int = 0) -> list[Any]:
        if port != 80:
            return real(host, port, flags)
        how = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*how, (LOOPBACK, provider.port))]

    monkeypatch.setattr(streams, "look_up", look_up)
    return provider


@pytest.fixture
def reached(
    make_transport: MakeTransport, proxy: ScriptedProvider, everywhere: ScriptedProvider
) -> Callable[[str, str], tuple[int, int]]:
    """Post to a host, and return how many posts arrived there and how many at the proxy."""

    def reach(no_proxy: str, host: str) -> tuple[int, int]:
        transport = make_transport(proxies={"http": f"http://{proxy.endpoint}", "no": no_proxy})
        assert post(transport, f"http://{host}/") == 200
        return len(everywhere.received), len(proxy.received)

    return reach


@pytest.mark.parametrize(
    ("no_proxy", "host", "directly"),
    [
        ("mail.example.com", "mail.example.com", True),
        ("example.com", "mail.example.com", True),
        (".example.com", "mail.example.com", True),
        ("EXAMPLE.com", "Mail.example.COM", True),
        ("other.org, example.com", "mail.example.com", True),
        ("*", "mail.example.com", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.7/24", "192.0.2.250", True),
        ("other.org, 10.0.0.0/8 ,192.0.2.0/24", "192.0.2.7", True),
        ("2001:db8::/32", "[2001:db8::1]", True),
        ("10.0.0.0/99,192.0.2.0/24", "192.0.2.7", True),
        ("", "mail.example.com", False),
        ("ample.com", "mail.example.com", False),
        ("mail.example.com", "example.com", False),
        ("other.org", "mail.example.com", False),
        ("192.0.2.0/24", "192.0.3.7", False),
        ("192.0.2.0/24", "mail.example.com", False),
        ("2001:db8::/32", "192.0.2.7", False),
    ],
)
def test_only_the_hosts_in_no_proxy_are_reached_directly(
    reached: Callable[[str, str], tuple[int, int]], no_proxy: str, host: str, directly: bool
) -> None:
    assert reached(no_proxy, host) == ((1, 0) if directly else (0, 1))
