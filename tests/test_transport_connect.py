"""Connecting: look-ups, addresses and TLS. Each failure gives its fault by the deadline."""

import errno
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from notifier.wire.transport import Transport
from tests.certificates import make_certificate, name_in_folder
from tests.fixtures import MakeProvider, MakeTransport
from tests.posting import failed, failure, post
from tests.scripted_provider import answer
from tests.sockets import LOOPBACK, descriptors_left, not_answering, refusing, silent
from tests.timing import eventually, within

Certificate = tuple[Path, ssl.SSLContext]
Address = tuple[int, int, int, str, Any]


def address(port: int, family: int = socket.AF_INET) -> Address:
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (LOOPBACK, port)


@pytest.fixture
def transport(make_transport: MakeTransport) -> Transport:
    return make_transport()


@pytest.fixture
def dead_port() -> Iterator[int]:
    with not_answering() as port:
        yield port


UNUSABLE = [
    "",
    "127.0.0.1:80/send",
    "mail.example.com",
    "ftp://127.0.0.1/",
    "mailto:someone@example.com",
    "http://",
    "http:///send",
    "http://[::1/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:port/",
    "http://*.example.com/",
    "http://.example.com/",
]


@pytest.mark.parametrize("url", UNUSABLE)
def test_an_invalid_url_fails_as_url(transport: Transport, url: str) -> None:
    assert failure(transport, url) == "url"


@pytest.mark.parametrize("name", ["does-not-exist.invalid", "a..example", f"{64 * 'a'}.example"])
def test_a_name_that_does_not_resolve_fails_as_dns(transport: Transport, name: str) -> None:
    assert failure(transport, f"http://{name}/", seconds=5) == "dns"


def test_a_failed_look_up_fails_as_dns_and_the_next_one_may_succeed(
    transport: Transport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    def fail() -> list[Address]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    provider = make_provider()
    url = f"http://mail.example.com:{provider.port}/"
    resolve(fail)
    assert failure(transport, url) == "dns"
    resolve(lambda: [address(provider.port)])
    assert post(transport, url) == 200


def test_a_name_without_an_address_fails_as_connect(
    transport: Transport, resolve: Callable[..., None]
) -> None:
    resolve(list)
    assert failure(transport, "http://mail.example.com/") == "connect"


def test_a_hanging_look_up_is_given_up_at_the_deadline_and_shared_by_ten_callers(
    transport: Transport, resolve: Callable[..., None]
) -> None:
    released = threading.Event()
    begun: list[str] = []
    kinds: list[str] = []

    def hang() -> list[Address]:
        begun.append("look-up")
        released.wait(30)
        return []

    def call() -> None:
        kinds.append(failure(transport, "http://mail.example.com/"))

    def look_up_threads() -> int:
        return sum(thread.name == "look-up" for thread in threading.enumerate())

    resolve(hang)
    callers = [threading.Thread(target=call) for _ in range(10)]
    try:
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
        assert kinds == ["dns"] * 10
        assert len(begun) == look_up_threads() == 1
    finally:
        released.set()
    eventually(lambda: look_up_threads() == 0)


def test_a_hanging_look_up_does_not_delay_other_hosts(
    transport: Transport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    released = threading.Event()

    def hang() -> list[Address]:
        released.wait(30)
        return []

    resolve(hang)
    try:
        assert failure(transport, "http://mail.example.com/", seconds=0.2) == "dns"
        with within(5):
            assert post(transport, make_provider().url) == 200
    finally:
        released.set()


def test_a_refused_connection_fails_as_connect(transport: Transport) -> None:
    with refusing() as port:
        url = f"http://{LOOPBACK}:{port}/"
        assert failed(transport, url) == ("connect", "connection refused")


def test_an_address_that_does_not_answer_is_given_up_at_the_deadline(
    transport: Transport, dead_port: int
) -> None:
    assert failed(transport, f"http://{LOOPBACK}:{dead_port}/") == ("connect", "timed out")


@pytest.mark.parametrize("addresses", [2, 8, 30])
def test_several_addresses_that_do_not_answer_share_the_deadline(
    transport: Transport, resolve: Callable[..., None], dead_port: int, addresses: int
) -> None:
    resolve(lambda: [address(dead_port)] * addresses)
    assert failure(transport, f"http://mail.example.com:{dead_port}/") == "connect"


def test_the_second_address_is_used_if_the_first_does_not_answer(
    transport: Transport,
    resolve: Callable[..., None],
    dead_port: int,
    make_provider: MakeProvider,
) -> None:
    provider = make_provider()
    resolve(lambda: [address(dead_port), address(provider.port)])
    with within(3):
        assert post(transport, "http://mail.example.com/", seconds=1) == 200


def test_the_second_address_is_used_if_the_first_refuses(
    transport: Transport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    provider = make_provider()
    with refusing() as port:
        resolve(lambda: [address(port), address(provider.port)])
        assert post(transport, "http://mail.example.com/") == 200


def test_an_address_of_a_family_that_this_machine_lacks_is_skipped(
    transport: Transport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    """AF_UNIX stands in for a missing IPv6: it has no TCP, so the socket cannot be made."""
    provider = make_provider()
    resolve(lambda: [address(provider.port, socket.AF_UNIX), address(provider.port)])
    assert post(transport, "http://mail.example.com/") == 200


def test_the_error_is_that_of_the_address_that_the_system_prefers(
    transport: Transport, resolve: Callable[..., None]
) -> None:
    """An address of a family that this machine lacks comes last, and says nothing of the peer."""
    with refusing() as port:
        resolve(lambda: [address(port), address(port, socket.AF_UNIX)])
        expected = ("connect", "connection refused")
        assert failed(transport, "http://mail.example.com/") == expected


NAMED = "http://mail.example.com/"
SHORTAGES = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def lower(words: str) -> str:
    return words[:1].lower() + words[1:]


@pytest.mark.parametrize("code", SHORTAGES)
@pytest.mark.parametrize("step", ["look-up", "connect", "authorities", "handshake"])
def test_our_own_shortage_is_not_blamed_on_the_provider(
    transport: Transport, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    seams = {
        "look-up": "notifier.wire.streams.look_up",
        "connect": "notifier.wire.streams._connect",
        "authorities": "notifier.wire.connector.trust",
        "handshake": "notifier.wire.streams.Plain.send",
    }
    monkeypatch.setattr(seams[step], raising(OSError(code, os.strerror(code))))
    with silent() as port:
        shortage = failed(transport, f"https://{LOOPBACK}:{port}/", seconds=5)
    assert shortage == ("shortage", lower(os.strerror(code)))


@pytest.mark.parametrize(
    "error", [MemoryError(), socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure")]
)
def test_a_lack_of_memory_is_a_shortage(
    transport: Transport, resolve: Callable[..., None], error: Exception
) -> None:
    resolve(raising(error))
    assert failure(transport, NAMED) == "shortage"


def test_a_look_up_for_which_no_thread_can_start_is_a_shortage_and_the_next_one_works(
    transport: Transport,
    resolve: Callable[..., None],
    make_provider: MakeProvider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = make_provider()
    resolve(lambda: [address(provider.port)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))
        assert failed(transport, NAMED) == ("shortage", "can't start new thread")
    assert post(transport, NAMED) == 200


@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_lack_of_descriptors_is_a_shortage(transport: Transport, scheme: str, host: str) -> None:
    with silent() as port, descriptors_left(0):
        expected = ("shortage", "too many open files")
        assert failed(transport, f"{scheme}://{host}:{port}/", seconds=5) == expected


def test_a_lack_of_a_descriptor_for_the_authorities_is_a_shortage(transport: Transport) -> None:
    with silent() as port, descriptors_left(1):
        assert failure(transport, f"https://{LOOPBACK}:{port}/", seconds=5) == "shortage"


@pytest.mark.parametrize(
    ("seam", "error"),
    [
        ("streams.look_up", socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
        (
            "connector.TLS",
            ssl.SSLCertVerificationError(1, "unable to get local issuer certificate"),
        ),
    ],
)
def test_a_lack_of_descriptors_that_a_library_hides_is_a_shortage(
    transport: Transport, monkeypatch: pytest.MonkeyPatch, seam: str, error: Exception
) -> None:
    """As glibc does in a process's first look-up, and OpenSSL for a folder of authorities."""

    def fail(*_: Any) -> Any:
        numbers.enter_context(descriptors_left(0))
        raise error

    monkeypatch.setattr(f"notifier.wire.{seam}", fail)
    with silent() as port, ExitStack() as numbers:
        expected = ("shortage", "too many open files")
        assert failed(transport, f"https://{LOOPBACK}:{port}/", seconds=5) == expected


CONNECTING = """
import os, resource, sys, time
from notifier.errors import TransportError
from notifier.wire.transport import Transport

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
transport = Transport(None, {}, connections=1, user_agent="notifier/test")
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
try:
    transport.post("http://localhost:1/", b"", {}, time.monotonic() + 5)
except TransportError as error:
    print(error.fault, error.detail)
"""


@pytest.mark.usefixtures("processes")
def test_the_first_look_up_of_a_process_without_a_free_descriptor_is_a_shortage() -> None:
    """glibc then says that it does not know the name."""
    command = [sys.executable, "-c", CONNECTING]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "shortage too many open files\n"


def test_no_connection_is_started_after_the_deadline(
    transport: Transport, resolve: Callable[..., None], make_provider: MakeProvider
) -> None:
    provider = make_provider()
    resolve(lambda: [address(provider.port)])
    assert failure(transport, provider.url, seconds=-1) == "connect"
    assert failure(transport, "http://mail.example.com/", seconds=-1) == "dns"
    assert provider.received == []


def test_a_certificate_of_the_bundle_is_trusted_and_its_connection_reused(
    make_transport: MakeTransport, make_provider: MakeProvider, certificate: Certificate
) -> None:
    bundle, context = certificate
    provider = make_provider(answer(202), tls=context)
    transport = make_transport(bundle)
    for name in (LOOPBACK, "localhost"):
        before = provider.connections
        for _ in range(3):
            assert post(transport, f"https://{name}:{provider.port}/") == 202
        assert provider.connections == before + 1


def test_the_authorities_are_read_at_the_first_https_call_and_only_then(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, context = certificate
    read: list[str] = []

    def trust(context: ssl.SSLContext, ca_bundle: str) -> None:
        read.append(ca_bundle)
        context.load_verify_locations(ca_bundle)

    monkeypatch.setattr("notifier.wire.connector.trust", trust)
    transport, plain = make_transport(bundle), make_provider()
    secure = [make_provider(tls=context) for _ in range(2)]
    assert post(transport, plain.url) == 200
    assert read == []
    assert [post(transport, provider.url) for provider in secure] == [200, 200]
    assert read == [str(bundle)]


def test_a_folder_of_certificates_is_a_bundle_too(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    certificate: Certificate,
    tmp_path: Path,
) -> None:
    bundle, context = certificate
    (tmp_path / name_in_folder(bundle)).write_bytes(bundle.read_bytes())
    assert post(make_transport(tmp_path), make_provider(tls=context).url) == 200


def test_a_certificate_of_an_unknown_authority_fails_as_tls(
    transport: Transport, make_provider: MakeProvider, certificate: Certificate
) -> None:
    provider = make_provider(tls=certificate[1])
    fault, detail = failed(transport, provider.url, seconds=5)
    assert fault == "tls"
    assert re.fullmatch("certificate verify failed: self.signed certificate", detail or "")
    assert provider.received == []


def test_the_bundle_of_the_environment_is_not_read_for_each_request(
    transport: Transport,
    make_provider: MakeProvider,
    certificate: Certificate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, context = certificate
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(bundle))
    assert failure(transport, make_provider(tls=context).url, seconds=5) == "tls"


def test_a_provider_with_an_untrusted_certificate_gets_the_alert_that_says_so(
    transport: Transport, certificate: Certificate
) -> None:
    heard: list[str] = []
    with socket.create_server((LOOPBACK, 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            try:
                certificate[1].wrap_socket(sock, server_side=True).recv(1)
            except ssl.SSLError as error:
                heard.append(error.reason)

        server = threading.Thread(target=serve)
        server.start()
        url = f"https://{LOOPBACK}:{listener.getsockname()[1]}/"
        assert failure(transport, url, seconds=5) == "tls"
        server.join(5)
    assert heard == ["TLSV1_ALERT_UNKNOWN_CA"]


def test_a_certificate_for_another_name_fails_as_tls(
    make_transport: MakeTransport,
    make_provider: MakeProvider,
    tmp_path: Path,
) -> None:
    bundle, context = make_certificate(tmp_path, "DNS:other.example.com", "IP:192.0.2.1")
    provider = make_provider(tls=context)
    transport = make_transport(bundle)
    for name in (LOOPBACK, "localhost"):
        fault, detail = failed(transport, f"https://{name}:{provider.port}/", seconds=5)
        assert fault == "tls"
        assert re.match(f"certificate verify failed: .*{name}", detail or "")
    assert provider.received == []


def test_a_plain_server_behind_https_fails_as_tls(
    transport: Transport, make_provider: MakeProvider
) -> None:
    assert failure(transport, f"https://{make_provider().endpoint}/") == "tls"


def test_a_silent_server_behind_https_fails_as_tls(transport: Transport) -> None:
    with silent() as port:
        assert failure(transport, f"https://{LOOPBACK}:{port}/") == "tls"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "the peer closed the connection during TLS"),
        # OpenSSL's versions differ.
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "wrong version number|record layer failure"),
        (b"\x16\x03\x03", "the peer closed the connection during TLS"),
    ],
)
def test_a_server_that_closes_within_the_handshake_fails_as_tls(
    transport: Transport, said: bytes, words: str
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((LOOPBACK, 0)))

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(said)

        server = threading.Thread(target=serve)
        server.start()
        stack.callback(server.join, 5)
        port = listener.getsockname()[1]
        fault, detail = failed(transport, f"https://{LOOPBACK}:{port}/", seconds=5)
        assert fault == "tls"
        assert re.fullmatch(words, detail or "")


def test_a_tls_server_behind_http_is_a_failure_and_gets_no_request(
    transport: Transport, make_provider: MakeProvider, certificate: Certificate
) -> None:
    provider = make_provider(tls=certificate[1])
    assert failure(transport, f"http://{provider.endpoint}/") in ("protocol", "reset")
    assert provider.received == []
