"""A real gunicorn whose environment or limits would mislead the libraries that it uses."""

import resource
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from tests.fixtures import MakeProvider
from tests.service import Service
from tests.sockets import LOOPBACK, refusing
from tests.test_db import LIBPQ

StartService = Callable[..., Service]


def reasons(service: Service) -> list[tuple[str, str | None]]:
    """Return reason and detail of each failed attempt in the log."""
    lines = (line for line in service.lines() if line["message"] == "attempt failed")
    return [(line["reason"], line["detail"]) for line in lines]


def test_variables_of_libpq_and_openssl_do_not_reach_the_services_connections(
    start_service: StartService,
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
    certificate: tuple[Path, ssl.SSLContext],
    tmp_path: Path,
) -> None:
    bundle, context = certificate
    provider = make_provider(tls=context)
    add_provider(provider.url)
    keys = tmp_path / "keys"
    service = start_service(
        **LIBPQ, HOME=str(tmp_path), SSLKEYLOGFILE=str(keys), REQUESTS_CA_BUNDLE=str(bundle)
    )
    service.wait_until_listening()
    assert service.notify().status_code == 200
    assert len(provider.received) == 1
    assert not keys.exists()


def test_a_proxy_that_cannot_be_reached_is_named_as_the_reason(
    start_service: StartService, add_provider: Callable[..., int]
) -> None:
    add_provider("https://mail.example.com/send")
    with refusing() as port:
        service = start_service(HTTPS_PROXY=f"http://user:s3cr3t@{LOOPBACK}:{port}")
        assert service.notify().status_code == 500
        assert service.metric("http_client_requests_total", error="proxy") == 1
    assert service.stop() == 0
    assert reasons(service) == [("proxy", "connection refused")]
    assert "s3cr3t" not in service.log.read_text()


@contextmanager
def without_descriptors(worker: psutil.Process) -> Iterator[None]:
    """Let `worker` open no more descriptors during the block."""
    soft, hard = worker.rlimit(resource.RLIMIT_NOFILE)
    taken = {int(number.name) for number in Path(f"/proc/{worker.pid}/fd").iterdir()}
    free = next(number for number in range(hard) if number not in taken)
    worker.rlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        worker.rlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="only Linux can limit a process")
@pytest.mark.parametrize("host", [LOOPBACK, "localhost"])
def test_a_healthy_provider_is_used_at_once_after_a_shortage_of_descriptors(
    start_service: StartService,
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
    host: str,
) -> None:
    provider = make_provider()
    add_provider(provider.url.replace(LOOPBACK, host))
    service = start_service().wait_until_listening()
    with requests.Session() as session:
        session.get(f"{service.url}/healthz", timeout=10)  # this connection is kept
        with without_descriptors(*service.booted()):
            for _ in range(5):
                assert service.notify(session=session).status_code == 500
        assert service.notify(session=session).status_code == 200
    assert service.metric("http_client_requests_total", error="shortage") == 5
    assert service.metric("circuit_breaker_state_changes_total") == 0
    assert service.stop() == 0
    assert reasons(service) == [("shortage", "too many open files")] * 5
