"""Requests that the server refuses before the application sees them."""

import json
import logging
import re
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from gunicorn.config import Config
from gunicorn.http import RequestParser, errors
from gunicorn.workers import base

from notifier.serving.refusals import Refusal, check_host
from tests.fixtures import Environment
from tests.service import Service
from tests.sockets import until_the_end
from tests.timing import eventually

StartService = Callable[..., Service]

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
FIELD = b"X: y\r\n"
END = b"\r\n\r\n"


HOSTS = [
    *(
        b"x",
        b"x:8080",
        b"x:",
        b"",
        b":80",
        b"a.example.com.",
        b"127.0.0.1:1",
        b"[::1]",
        b"[::1]:80",
    ),
    *(b"[::ffff:1.2.3.4]", b"[v1.a:b]", b"x%2Fy", b"a_b~c!$&'()*+,;=", b"UPPER", b"1.2.3.4.5"),
]
WRONG_HOSTS = [
    *(b"a b", b"a/b", b"a?b", b"a#b", b"user@x", b"a:b", b"a:1:2", b"a:-1", b"::1", b"[::1"),
    *(b"::1]", b"[::1]x", b"[::1]:x", b"[fe80::1%25eth0]", b"[fe80::1%eth0]", b"[1.2.3.4]", b"[]"),
    *(b"[:::1]", b"[12345::]", b"[v.a]", b"[v1.]", b"x%2", b"x%zz", b"\xc3\xa4", b'"x"', b"a\\b"),
    *(b"<x>", b"a|b", b"a^b", b"{x}", b"http://x", b"a,b c"),
]


def parsed(head: bytes) -> Any:
    return next(RequestParser(Config(), iter([head]), ("127.0.0.1", 1)))


@pytest.mark.parametrize("host", HOSTS)
def test_a_well_formed_host_is_accepted(host: bytes) -> None:
    check_host(parsed(b"GET / HTTP/1.1\r\nX: y\r\nHost: " + host + b"\r\n\r\n"))


@pytest.mark.parametrize("host", WRONG_HOSTS)
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_malformed_host_is_refused(host: bytes, version: bytes) -> None:
    request = parsed(b"GET / HTTP/" + version + b"\r\nX: y\r\nHost: " + host + b"\r\n\r\n")
    with pytest.raises(errors.InvalidHeader):
        check_host(request)


def test_only_http_1_0_needs_no_host() -> None:
    check_host(parsed(b"GET / HTTP/1.0\r\n\r\n"))
    with pytest.raises(errors.InvalidHeader):
        check_host(parsed(b"GET http://x/ HTTP/1.1\r\n\r\n"))


ERRORS = [
    errors.ConfigurationProblem("x"),
    errors.ExpectationFailed("x"),
    errors.ForbiddenProxyRequest("x"),
    errors.InvalidHTTPVersion("x"),
    errors.InvalidHeader("x"),
    errors.InvalidHeaderName("x"),
    errors.InvalidRequestLine("x"),
    errors.InvalidRequestMethod("x"),
    errors.InvalidResponseHeader("x"),
    errors.InvalidResponseHeaderName("x"),
    errors.InvalidSchemeHeaders(),
    errors.LimitRequestHeaders("x"),
    errors.LimitRequestLine(2, 1),
    errors.ObsoleteFolding("x"),
    errors.UnsupportedTransferCoding("x"),
    ValueError("x"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_refusal_has_gunicorns_status(error: Exception) -> None:
    """gunicorn's own reply to the error has the same status."""
    worker = object.__new__(base.Worker)
    worker.log, worker.cfg = logging.getLogger("a test"), Config()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker.handle_error(None, ours, ("127.0.0.1", 1), error)
        status = int(theirs.recv(65536).split()[1])
    assert Refusal.of(error) == (status, type(error).__name__)


# --- the service

REFUSED = [
    (GET + b"X: " + b"y" * 9000 + END, 431),
    (GET + FIELD * 100 + END, 431),
    (GET.replace(b"healthz", b"x" * 4100) + END, 414),
    (GET.replace(b"healthz", b"x" * 70_000), 414),
    (GET + b"Expect: 200-ok" + END, 417),
    (GET.replace(b"GET", b"get") + END, 400),
    (GET.replace(b"GET", b"G" * 100) + END, 400),
    (GET.replace(b"GET", b"G\xc3\xa4T") + END, 400),
    (GET + b"Transfer-Encoding: br" + END, 501),
    (GET + b"Transfer-Encoding: gzip" + END, 400),
    (GET + b"Content-Length: 1" + END[:2] + b"Content-Length: 2" + END, 400),
    (GET + b"Content-Length: -1" + END, 400),
    (GET + b"X : y" + END, 400),
    (GET + b"X: y\r\n folded" + END, 400),
    (GET + b"Host: x" + END, 400),
    (GET.replace(b"Host: x", b"Host: a b") + END, 400),
    (GET.replace(b"Host: x", b"X: y") + END, 400),
    (b"GET /healthz\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\n\n", 400),
    (b"\r\n\r\n\n", 400),
]


def test_a_refused_request_gets_the_envelope_and_an_id_and_is_counted(
    start_service: StartService,
) -> None:
    service = start_service(WEB_CONCURRENCY="1").wait_until_listening()
    for data, status in REFUSED:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as sock:
            sock.sendall(data)
            reply = until_the_end(sock)
        head, _, content = reply.partition(END)
        assert head.startswith(b"HTTP/1.1 %d " % status), (data[:80], reply)
        assert re.search(rb"\r\nX-Request-Id: [0-9a-f]{32}(\r\n|$)", head)
        assert b"\r\nConnection: close\r\n" in head
        assert b"\r\nContent-Type: application/json\r\n" in head
        error = json.loads(content)["error"]
        assert error["code"] == "E112"
        assert error["message"]
    statuses = Counter(str(status) for _, status in REFUSED)
    for status, count in statuses.items():
        labels = {"http_route": "unmatched", "http_status_code": status, "http_method": "_OTHER"}
        assert service.metric("http_server_requests_total", **labels) == count
    lines = [line for line in service.lines() if line.get("code") == "E112"]
    assert Counter(str(line["status"]) for line in lines) == statuses
    assert {line["level"] for line in lines} == {"INFO"}
    assert all(line["reason"] and line["ip"] == "127.0.0.1" for line in lines)
    assert "Traceback" not in service.log.read_text()
    assert "folded" not in service.log.read_text()


def test_a_path_that_the_configuration_does_not_allow_is_an_internal_error(
    tmp_path: Path, database: Environment
) -> None:
    service = Service(tmp_path, database | {"SCRIPT_NAME": "/notifier"})

    def status(path: str) -> int:
        try:
            return requests.get(service.url + path, timeout=10).status_code
        except requests.ConnectionError:
            return 0

    try:
        eventually(lambda: status("/notifier/healthz") == 200)
        assert status("/healthz") == 500
    finally:
        service.stop()
