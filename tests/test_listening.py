"""Where the service listens, with both families of addresses or without IPv6."""

import errno
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from notifier.serving import listening
from tests.service import ROOT, Service, clean_environment
from tests.test_containers_static import parsed_command
from tests.test_lifecycle import reload, second_master
from tests.timing import within

StartService = Callable[..., Service]

IPV4, IPV6 = "127.0.0.1", "::1"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    listening.addresses.cache_clear()
    yield
    listening.addresses.cache_clear()


@pytest.fixture
def _ipv6() -> None:
    try:
        socket.create_server((IPV6, 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error.strerror}")


def answering(service: Service) -> set[str]:
    """Return which loopback addresses answer."""
    found = set()
    for host in (IPV4, IPV6):
        try:
            connection = socket.create_connection((host, service.port), timeout=10)
        except OSError:
            continue
        with connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            if b" 200 " in connection.recv(4096):
                found.add(host)
    return found


# --- the service


@pytest.mark.usefixtures("_ipv6")
@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("", {IPV4, IPV6}),
        ("127.0.0.1", {IPV4}),
        ("0.0.0.0", {IPV4}),
        ("::1", {IPV6}),
    ],
)
def test_the_service_listens_on_both_families_or_on_the_address_that_is_set(
    start_service: StartService, host: str, answers: set[str]
) -> None:
    service = start_service(**({"HTTP_SERVER_HOST": host} if host else {}))
    assert answering(service) == answers


@pytest.mark.usefixtures("_ipv6")
def test_both_families_answer_after_a_reload_and_an_upgrade(start_service: StartService) -> None:
    service = start_service()
    reload(service, starts=2)
    assert answering(service) == {IPV4, IPV6}
    with second_master(service):
        assert service.stop() == 0
        assert answering(service) == {IPV4, IPV6}


def test_a_reload_keeps_the_sockets_although_the_address_is_gone(
    start_service: StartService, tmp_path: Path
) -> None:
    """gunicorn would bind to the new addresses while the old workers still hold the port."""
    config, gone = tmp_path / "config.py", tmp_path / "gone"
    config.write_text(ADDRESS_GONE)
    service = start_service(GUNICORN_CMD_ARGS=f"--config {config}", GONE=str(gone))
    gone.touch()
    reload(service, starts=2)
    assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200
    assert len([line for line in service.lines() if "Listening at" in line["message"]]) == 1


ADDRESS_GONE = """
import os, runpy
from notifier.serving import listening

if os.path.exists(os.environ["GONE"]):
    def fail(host):
        raise OSError
    listening._is_ipv6_only = fail
globals().update(runpy.run_path("gunicorn.conf.py"))
"""


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("203.0.113.7", "an address of this machine"),
        ("2001:db8::7", "an address of this machine"),
        ("localhost", "an IP address without brackets"),
        ("[::1]", "an IP address without brackets"),
    ],
)
def test_a_host_that_cannot_be_used_stops_the_start_with_one_line(
    tmp_path: Path, server: dict[str, str], host: str, expected: str
) -> None:
    service = Service(tmp_path, server | {"HTTP_SERVER_HOST": host})
    assert service.process.wait(30) == 1
    (line,) = service.log.read_text().splitlines()
    assert line.startswith(f'notifier cannot start: HTTP_SERVER_HOST is "{host}": expected ')
    assert expected in line


@pytest.mark.parametrize("host", ["", " ", "0.0.0.0", "::1"])
def test_the_images_health_check_asks_where_the_service_listens(
    start_service: StartService, request: pytest.FixtureRequest, host: str
) -> None:
    if host == IPV6:
        request.getfixturevalue("_ipv6")
    service = start_service(**({"HTTP_SERVER_HOST": host} if host.strip() else {}))
    _, option, code = parsed_command("HEALTHCHECK")
    at = {"HTTP_SERVER_HOST": host, "HTTP_SERVER_PORT": f":{service.port}"}
    check = subprocess.run([sys.executable, option, code], env=at, timeout=30, check=False)
    assert check.returncode == 0


def test_an_idle_connection_is_kept_as_long_as_the_setting_says(
    start_service: StartService,
) -> None:
    service = start_service(HTTP_SERVER_KEEPALIVE="1500ms")
    with socket.create_connection((IPV4, service.port), timeout=20) as connection, within(10):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"keep-alive" in connection.recv(4096)
        replied = time.monotonic()
        while connection.recv(4096):
            pass
        assert time.monotonic() - replied > 1.5


# --- the addresses


class Sockets:
    """The module `socket`, where IPv6 fails or is not shared with IPv4."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return self._changes.get(name, getattr(socket, name))


def test_without_ipv6_the_service_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: int) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(listening, "socket", Sockets(socket=refuse))
    assert listening.addresses(None, 8080) == ["0.0.0.0:8080"]


IN_A_NAMESPACE = """
import logging, socket
from gunicorn.config import Config
from gunicorn.sock import create_sockets
from notifier.serving import listening

config = Config()
config.set("bind", listening.addresses(None, 8080))
listeners = create_sockets(config, logging.getLogger())
for host in ("127.0.0.1", "::1"):
    try:
        socket.create_connection((host, 8080), 5).close()
    except OSError:
        continue
    print(host)
"""


@pytest.mark.usefixtures("processes")
@pytest.mark.needs("unshare")
@pytest.mark.needs("ip")
@pytest.mark.parametrize(
    ("switch", "answers"),
    [
        ("conf/all/disable_ipv6", {IPV4}),
        ("bindv6only", {IPV4, IPV6}),
    ],
)
def test_the_service_answers_however_the_system_treats_ipv6(switch: str, answers: set[str]) -> None:
    namespace = ["unshare", "--map-root-user", "--net", "sh", "-c"]
    if subprocess.run([*namespace, f"test -w /proc/sys/net/ipv6/{switch}"], check=False).returncode:
        pytest.skip("no network namespace with IPv6 can be made here")
    setup = f"ip link set lo up && echo 1 > /proc/sys/net/ipv6/{switch}"
    shown = subprocess.run(
        [*namespace, f'{setup} && exec "$0" -c "$1"', sys.executable, IN_A_NAMESPACE],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert set(shown.split()) == answers


@pytest.mark.parametrize(
    ("client", "plain"),
    [
        (("::ffff:192.0.2.7", 4711, 0, 0), ("192.0.2.7", 4711)),
        (("2001:db8::7", 4711, 0, 0), ("2001:db8::7", 4711, 0, 0)),
        (("192.0.2.7", 4711), ("192.0.2.7", 4711)),
        ("", ""),
    ],
)
def test_an_ipv4_caller_has_an_ipv4_address(client: Any, plain: Any) -> None:
    assert listening.plain(client) == plain
