"""Hostile providers behind a real gunicorn: every notification arrives, and no worker leaks."""

import itertools
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures import MakeProvider
from tests.scripted_provider import Peer, Received, Script, answer
from tests.service import Service
from tests.test_hostile import BAD_TLS, BIG, MISBEHAVIOURS, by_hand
from tests.test_transport import NO_STATUS_LINE, ODD_ENDS
from tests.timing import eventually

StartService = Callable[..., Service]
MB = 1024**2
LAST_READ = "preference_last_refresh_timestamp_seconds"

# The misbehaviours of test_hostile and test_transport that an ordinary notification can meet.
SCRIPTS = {
    **{name: each.script for name, each in MISBEHAVIOURS.items() if not each.eager},
    **{name: script for name, (script, _) in NO_STATUS_LINE.items()},
    **ODD_ENDS,
}
EAGER = {
    name: each.script for name, each in MISBEHAVIOURS.items() if each.eager and each.body != BIG
}
DEADLINE = 5  # seconds


class Rotation:
    """A script that misbehaves in another way at each request; `unused` names those to come."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        self._scripts = scripts
        self._next = itertools.cycle(scripts)
        self.unused = set(scripts)

    def __call__(self, peer: Peer, received: Received) -> None:
        name = next(self._next)
        self.unused.discard(name)
        self._scripts[name](peer, received)


class Workers:
    """The resources that a service's workers use."""

    def __init__(self, service: Service) -> None:
        self._processes = service.booted()
        self.peak = 0
        self._stopping = threading.Event()

    def in_use(self) -> tuple[int, int]:
        """Return the number of threads and of descriptors of all workers."""
        threads = sum(worker.num_threads() for worker in self._processes)
        return threads, sum(worker.num_fds() for worker in self._processes)

    def memory(self) -> int:
        """Return the resident memory of the largest worker, in bytes."""
        return max(worker.memory_info().rss for worker in self._processes)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the highest memory use during the block in `peak`."""

        def watch() -> None:
            while not self._stopping.wait(0.05):
                self.peak = max(self.peak, self.memory())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()


@pytest.fixture
def rotations(
    make_provider: MakeProvider, certificate: tuple[Path, ssl.SSLContext]
) -> dict[str, tuple[Rotation, str]]:
    """Return rotations and their channels by the URL of the provider that runs them."""
    context = certificate[1]
    bad_tls = {name: by_hand(act, context) for name, (act, _) in BAD_TLS.items()}
    plain, over_tls, bare, eager = (Rotation(cast) for cast in (SCRIPTS, SCRIPTS, bad_tls, EAGER))
    first, second = make_provider(bare), make_provider(eager)
    first.eager = second.eager = True
    return {
        make_provider(plain).url: (plain, "Email"),
        first.url.replace("http", "https"): (bare, "Email"),
        make_provider(over_tls, tls=context).url: (over_tls, "PushNotification"),
        second.url: (eager, "PushNotification"),
    }


def test_whatever_providers_do_the_next_one_delivers_in_time_and_no_worker_leaks(
    start_service: StartService,
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
    certificate: tuple[Path, ssl.SSLContext],
    rotations: dict[str, tuple[Rotation, str]],
) -> None:
    healthy = make_provider(answer(200, b"", "Connection: close"))
    service = start_service(
        WEB_THREADS="12",
        HTTP_CLIENT_TIMEOUT="700ms",
        NOTIFY_DEADLINE=f"{DEADLINE}s",
        CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP="1000000",
        REQUESTS_CA_BUNDLE=str(certificate[0]),
    ).wait_until_listening()
    workers = Workers(service)

    def notify(_: int) -> tuple[int, bool]:
        began = time.monotonic()
        status = service.notify("seller").status_code
        return status, time.monotonic() - began < DEADLINE + 1

    def notify_often(times: int) -> set[tuple[int, bool]]:
        with ThreadPoolExecutor(20) as callers:
            return set(callers.map(notify, range(times)))

    for channel in ("Email", "PushNotification"):
        add_provider(healthy.url, channel, priority=9)
    eventually(lambda: service.notify("seller").status_code == 200)
    notify_often(100)
    at_first = workers.memory()
    for priority, (url, (_, channel)) in enumerate(rotations.items()):
        add_provider(url, channel, priority=priority)
    with workers.watched():
        assert notify_often(40) == {(200, True)}
        threads, descriptors = workers.in_use()
        assert notify_often(90) == {(200, True)}
    assert [name for rotation, _ in rotations.values() for name in rotation.unused] == []
    # The margin: threads that were not needed before, idle connections not checked since.
    eventually(lambda: workers.in_use()[1] <= descriptors + 4)
    assert workers.in_use()[0] <= threads + 4
    assert workers.peak - at_first < 20 * MB


@pytest.fixture
def patient(start_service: StartService) -> Service:
    """A service with one worker whose attempts may take longer than any test."""
    return start_service(
        WEB_CONCURRENCY="1",
        WEB_THREADS="8",
        HTTP_CLIENT_TIMEOUT="30s",
        CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP="1",
        CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT="1s",
        CIRCUIT_BREAKER_MAX_HALF_OPEN_REQUESTS="1",
    ).wait_until_listening()


@contextmanager
def callers(released: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool for callers; set `released` at the end, so that every call gets its answer."""
    with ThreadPoolExecutor(4) as executor:
        try:
            yield executor
        finally:
            released.set()


def holds(released: threading.Event) -> Script:
    """Return a script that answers once `released` is set."""

    def script(peer: Peer, received: Received) -> None:
        released.wait(60)
        answer(200)(peer, received)

    return script


def test_other_channels_and_providers_are_used_while_an_email_provider_hangs(
    patient: Service,
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
) -> None:
    hanging, push, other = make_provider(), make_provider(), make_provider()
    add_provider(hanging.url, priority=1)
    add_provider(push.url, "PushNotification")
    eventually(lambda: patient.notify("seller").status_code == 200)
    released = threading.Event()
    hanging.script = holds(released)
    emails, pushes = len(hanging.received), len(push.received)
    with callers(released) as sellers:
        under_way = [sellers.submit(patient.notify, "seller") for _ in range(4)]
        eventually(lambda: len(hanging.received) == emails + 4)
        eventually(lambda: len(push.received) == pushes + 4)
        read = patient.metric(LAST_READ)
        add_provider(other.url, priority=0)
        eventually(lambda: patient.metric(LAST_READ) > read)
        assert [patient.notify("seller").status_code for _ in range(20)] == [200] * 20
        assert len(push.received) == pushes + 24
        assert not any(seller.done() for seller in under_way)
        released.set()
        assert [seller.result().status_code for seller in under_way] == [200] * 4
    assert len(hanging.received) == emails + 4


def test_buyers_fall_back_at_once_while_a_probe_of_the_first_provider_hangs(
    patient: Service,
    make_provider: MakeProvider,
    add_provider: Callable[..., int],
) -> None:
    first, fallback = make_provider(answer(503)), make_provider()
    add_provider(fallback.url, priority=2)
    add_provider(first.url, priority=1)
    eventually(lambda: patient.notify().status_code == 200 and first.received)
    released, failed = threading.Event(), len(first.received)
    first.script = holds(released)

    def probe() -> None:
        """Notify until the breaker admits a probe of the first provider."""
        while len(first.received) == failed:
            assert patient.notify().status_code == 200

    with callers(released) as buyers:
        probing = buyers.submit(probe)
        eventually(lambda: len(first.received) > failed)
        answered = len(fallback.received)
        assert [patient.notify().status_code for _ in range(20)] == [200] * 20
        assert len(fallback.received) == answered + 20
        assert not probing.done()
        released.set()
        probing.result()
    assert len(first.received) == failed + 1
