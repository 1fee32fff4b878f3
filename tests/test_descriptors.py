"""The limit of open files: raised at the start, and enough for the connections that it allows."""

import resource
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from notifier.serving import descriptors
from tests.fixtures import MakeProvider, MakeSettings
from tests.service import Service
from tests.test_lifecycle import Gate, reload

StartService = Callable[..., Service]
AddProvider = Callable[..., int]

INFINITY = resource.RLIM_INFINITY

LIMITED = """
import os, resource, runpy

limits = int(os.environ["SOFT"]), int(os.environ["HARD"])
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
globals().update(runpy.run_path("gunicorn.conf.py"))
"""


@pytest.fixture
def limits(tmp_path: Path) -> Callable[[int, int], dict[str, str]]:
    """Return the variables that start the service with a soft and a hard limit of open files."""

    def of(soft: int, hard: int) -> dict[str, str]:
        config = tmp_path / "limited.py"
        config.write_text(LIMITED)
        return {
            "GUNICORN_CMD_ARGS": f"--config {config}",
            "SOFT": str(soft),
            "HARD": str(hard),
        }

    return of


def warnings(service: Service) -> list[dict[str, Any]]:
    message = "the limit of open files allows few connections"
    return [line for line in service.lines() if line["message"] == message]


# --- the service


def test_the_soft_limit_is_raised_to_the_hard_limit(
    start_service: StartService, limits: Callable[..., dict[str, str]]
) -> None:
    service = start_service(**limits(256, 1500))
    (worker,) = service.booted()
    assert worker.rlimit(psutil.RLIMIT_NOFILE) == (1500, 1500)
    assert warnings(service) == []


def test_with_a_low_limit_every_seller_is_served_beside_as_many_callers_as_are_allowed(
    start_service: StartService,
    limits: Callable[..., dict[str, str]],
    make_provider: MakeProvider,
    add_provider: AddProvider,
) -> None:
    """32 sellers at once need 64 calls; each provider has its own idle connections."""
    gate = Gate()
    for channel in ("Email", "PushNotification"):
        add_provider(make_provider(gate).url, channel)
    service = start_service(**limits(256, 256))
    (warning,) = warnings(service)
    assert (warning["limit"], warning["wanted"]) == (256, 1000)
    (worker,) = service.booted()
    with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        for _ in range(warning["connections"] - 32):
            connection = socket.create_connection(("127.0.0.1", service.port))
            stack.enter_context(connection)
        sellers = [pool.submit(service.notify, "seller") for _ in range(32)]
        gate.wait_for(64)
        others = worker.num_fds() - warning["connections"] - 64
        gate.open()
        assert [seller.result().status_code for seller in sellers] == [200] * 32
    assert others <= descriptors.FILES
    assert "Too many open files" not in service.log.read_text()


def test_a_reload_does_not_change_the_limit(
    start_service: StartService, limits: Callable[..., dict[str, str]]
) -> None:
    service = start_service(**limits(256, 256))
    reload(service, starts=2)
    (worker,) = service.booted()
    assert worker.rlimit(psutil.RLIMIT_NOFILE) == (256, 256)
    assert len(warnings(service)) == 1


def test_a_limit_that_is_too_low_stops_the_start_with_one_line(
    tmp_path: Path, server: dict[str, str], limits: Callable[..., dict[str, str]]
) -> None:
    service = Service(tmp_path, server | limits(103, 103))
    assert service.process.wait(30) == 1
    assert service.log.read_text() == (
        "notifier cannot start: the limit of open files (ulimit -n) is 103: expected at least 104\n"
    )


# --- the limit


@pytest.mark.parametrize(
    ("soft", "hard", "most", "raised"),
    [
        (256, 256, INFINITY, 256),
        (256, 4096, INFINITY, 4096),
        (1024, 1_073_741_816, INFINITY, 65_536),
        (1_073_741_816, 1_073_741_816, INFINITY, 1_073_741_816),  # never lowered
        (256, INFINITY, INFINITY, 65_536),
        (INFINITY, INFINITY, INFINITY, 65_536),
        (256, INFINITY, 24_576, 10_240),  # as on macOS
        (256, 4096, 256, 256),
    ],
)
def test_the_limit_is_raised_as_far_as_is_allowed_and_useful(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int, raised: int
) -> None:
    """Args: `most` is the number above which the system refuses a soft limit."""
    limits = [soft, hard]

    def set_limits(_: int, wanted: tuple[int, int]) -> None:
        if most != INFINITY and wanted[0] > most:
            raise ValueError("current limit exceeds maximum limit")
        limits[:] = wanted

    fake = SimpleNamespace(
        getrlimit=lambda _: tuple(limits),
        setrlimit=set_limits,
        RLIMIT_NOFILE=resource.RLIMIT_NOFILE,
        RLIM_INFINITY=INFINITY,
    )
    monkeypatch.setattr(descriptors, "resource", fake)
    for _ in range(2):  # a reload does it again
        assert descriptors.raise_limit() == raised
    assert limits == [raised if soft != INFINITY else soft, hard]


@pytest.mark.parametrize(
    ("web_threads", "limit", "connections"),
    [
        (32, 65_536, 1000),
        (32, 1192, 1000),
        (32, 1024, 832),
        (32, 256, 64),
        (32, 224, 32),  # one for each place
        (32, 128, 12),
        (1, 128, 60),
        (512, 65_536, 2056),
        (512, 1024, 192),
        (512, 104, 8),
    ],
)
def test_callers_get_the_descriptors_that_calls_to_providers_leave(
    make_settings: MakeSettings, web_threads: int, limit: int, connections: int
) -> None:
    settings = make_settings(web_threads=web_threads)
    assert descriptors.connections(settings, limit) == connections
