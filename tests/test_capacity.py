"""Capacity: how many notifications run at once, how long others wait, and when they are refused."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import requests

from notifier import ranked_queue
from notifier.arrival import Arrival
from notifier.capacity import Capacity
from notifier.errors import Overloaded
from notifier.serving.caller import REQUEST_SECONDS
from tests.fixtures import Growth, MakeProvider
from tests.scripted_provider import Peer, Received, answer
from tests.service import MESSAGE, Service
from tests.sockets import until_the_end
from tests.timing import eventually, within

StartService = Callable[..., Service]
AddProvider = Callable[..., int]

LONG = 60.0  # seconds; only a failing test waits this long
SHORT = 0.02
PATIENCE = 1.0  # seconds for which the service lets a request wait
NOTIFY = "/api/v1.0/recipient/buyer/notify"
OVERLOADED = {"error": {"code": "E106", "message": "too many requests, try again later"}}


def arrived(seconds_ago: float) -> Arrival:
    at = time.monotonic() - seconds_ago
    return Arrival(at, at)


def take(capacity: Capacity, places: int = 1) -> None:
    for _ in range(places):
        capacity.take(Arrival.now())


def give(capacity: Capacity, places: int = 1) -> None:
    for _ in range(places):
        capacity.give()


def is_as_new(capacity: Capacity, places: int) -> bool:
    return capacity._free == places and not capacity._queue


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


def queue(pool: ThreadPoolExecutor, capacity: Capacity, then: Callable[[], None]) -> "Future[None]":
    """Start a thread that waits for a place and then calls `then`; return once it waits."""

    def wait() -> None:
        take(capacity)
        then()

    already = len(capacity._queue)
    waiting = pool.submit(wait)
    eventually(lambda: len(capacity._queue) == already + 1)
    return waiting


# --- the places


def test_free_places_are_taken_without_waiting(growth: Growth) -> None:
    capacity = Capacity(3, LONG)
    take(capacity, 3)
    assert growth("notification_wait_seconds_count") == {}


def test_as_many_requests_may_wait_as_there_are_places_and_the_next_is_refused(
    pool: ThreadPoolExecutor, growth: Growth
) -> None:
    capacity = Capacity(3, LONG)
    take(capacity, 3)
    waiting = [queue(pool, capacity, lambda: None) for _ in range(3)]
    for _ in range(2):
        with within(LONG / 10), pytest.raises(Overloaded):
            take(capacity)
    assert growth("notifications_refused_total") == {(): 2}

    give(capacity, 3)
    for each in waiting:
        each.result(LONG / 10)
    assert growth("notification_wait_seconds_count") == {(): 3}
    give(capacity, 3)
    assert is_as_new(capacity, 3)


def test_waiting_requests_get_places_in_order_of_arrival(
    pool: ThreadPoolExecutor,
) -> None:
    capacity = Capacity(3, LONG)
    take(capacity, 3)
    came: list[int] = []
    for number in range(3):
        queue(pool, capacity, lambda number=number: came.append(number))
    for number in range(3, 6):
        give(capacity)
        queue(pool, capacity, lambda number=number: came.append(number))
        eventually(lambda number=number: len(came) == number - 2)
    for number in range(3, 6):
        give(capacity)
        eventually(lambda number=number: len(came) == number + 1)
    assert came == [0, 1, 2, 3, 4, 5]


def test_a_request_that_waited_too_long_is_refused_and_leaves_the_queue(growth: Growth) -> None:
    capacity = Capacity(1, SHORT)
    take(capacity)
    for times in (1, 2):
        with pytest.raises(Overloaded):
            take(capacity)
        assert growth("notifications_refused_total") == {(): times}
        assert growth("notification_wait_seconds_count") == {(): times}
    assert growth("notification_wait_seconds_sum")[()] >= 2 * SHORT
    give(capacity)
    assert is_as_new(capacity, 1)


def test_a_request_that_leaves_the_queue_does_not_use_up_the_turn_of_the_next(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = Capacity(2, LONG)
    take(capacity, 2)
    came: list[str] = []
    patience_ends = threading.Event()

    class Turn:
        """A turn that never comes; the wait for it times out when the test says so."""

        def acquire(self, timeout: float | None = None) -> bool:
            return timeout is None or not patience_ends.wait(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(ranked_queue, "threading", SimpleNamespace(Lock=Turn))
        impatient = queue(pool, capacity, lambda: came.append("impatient"))
    patient = queue(pool, capacity, lambda: came.append("patient"))
    patience_ends.set()
    with pytest.raises(Overloaded):
        impatient.result(LONG / 10)
    give(capacity)
    patient.result(LONG / 10)
    assert came == ["patient"]


def test_a_place_handed_over_just_as_the_wait_times_out_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, growth: Growth
) -> None:
    capacity = Capacity(1, SHORT)
    take(capacity)

    class Turn:
        """A turn that comes after the wait timed out, but before the waiter has the lock."""

        def acquire(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                give(capacity)
            return timeout is None

        def release(self) -> None:
            """Do nothing: the waiter has timed out already."""

    monkeypatch.setattr(ranked_queue, "threading", SimpleNamespace(Lock=Turn))
    take(capacity)
    assert growth("notifications_refused_total") == {}
    assert growth("notification_wait_seconds_count") == {(): 1}
    give(capacity)
    assert is_as_new(capacity, 1)


def test_times_count_from_the_arrival_of_a_request(growth: Growth) -> None:
    capacity = Capacity(1, patience=LONG, latest=2 * LONG)
    capacity.take(arrived(1.5 * LONG))
    with pytest.raises(Overloaded) as raised, within(LONG / 10):
        capacity.take(arrived(1.5 * LONG))
    assert raised.value.reason == "no place in time"
    assert growth("notification_wait_seconds_count") == {(): 2}
    assert growth("notification_wait_seconds_sum")[()] >= 3 * LONG


def test_a_request_that_comes_too_late_for_an_attempt_is_refused(growth: Growth) -> None:
    capacity = Capacity(1, patience=SHORT, latest=LONG)
    with pytest.raises(Overloaded) as raised:
        capacity.take(arrived(1.1 * LONG))
    assert raised.value.reason == "no time left"
    assert growth("notifications_refused_total") == {(): 1}
    assert is_as_new(capacity, 1)


def test_under_load_no_place_is_lost_or_taken_twice() -> None:
    places, threads = 3, 12
    capacity = Capacity(places, 0.001)
    inside, most = [0], [0]
    guard = threading.Lock()

    def press(_: int) -> tuple[int, int]:
        came = refused = 0
        for _ in range(300):
            try:
                take(capacity)
            except Overloaded:
                refused += 1
                continue
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            came += 1
            threading.Event().wait(0.0005)
            with guard:
                inside[0] -= 1
            give(capacity)
        return came, refused

    with ThreadPoolExecutor(threads) as pool:
        came, refused = map(sum, zip(*pool.map(press, range(threads)), strict=True))
    assert came + refused == threads * 300
    assert came
    assert refused
    assert most[0] == places
    assert is_as_new(capacity, places)


# --- the service


class Turnstile:
    """A provider's script that holds each request until the test lets one through.

    `titles` holds the messages' titles in order of arrival.
    """

    def __init__(self) -> None:
        self.titles: list[str] = []
        self._asked = threading.Semaphore(0)
        self._let = threading.Semaphore(0)

    def __call__(self, peer: Peer, received: Received) -> None:
        self.titles.append(received.json()["title"])
        self._asked.release()
        self._let.acquire(timeout=30)
        answer()(peer, received)

    def wait_for(self, requests: int) -> None:
        for _ in range(requests):
            assert self._asked.acquire(timeout=20)

    def let(self, requests: int) -> None:
        self._let.release(requests)


@pytest.fixture
def email(make_provider: MakeProvider, add_provider: AddProvider) -> Iterator[Turnstile]:
    """The only email provider."""
    turnstile = Turnstile()
    add_provider(make_provider(turnstile).url)
    yield turnstile
    turnstile.let(1000)


@pytest.fixture
def start(start_service: StartService) -> StartService:
    """Start a service with one worker and a long time-out for its providers."""
    return lambda threads: start_service(
        WEB_CONCURRENCY="1",
        WEB_THREADS=str(threads),
        HTTP_CLIENT_TIMEOUT="30s",
        LOG_LEVEL="INFO",
    ).wait_until_listening()


@contextmanager
def taken(service: Service, email: Turnstile, places: int) -> Iterator[list[Any]]:
    """Keep `places` notifications under way during the block; they are delivered after it."""
    with ThreadPoolExecutor(places) as pool:
        under_way = [pool.submit(service.notify) for _ in range(places)]
        try:
            email.wait_for(places)
            yield under_way
        finally:
            email.let(1000)
    assert [each.result().status_code for each in under_way] == [200] * places


def in_progress(service: Service) -> float:
    return service.metric("http_server_active_requests")


def test_a_full_worker_refuses_notifications_and_still_answers_operators(
    start: StartService, email: Turnstile, pool: ThreadPoolExecutor
) -> None:
    service = start(3)
    with taken(service, email, 3):
        calls = [pool.submit(service.notify) for _ in range(15)]
        for _ in range(5):
            for path in ("/healthz", "/readyz", "/metrics"):
                with within(PATIENCE):
                    assert requests.get(f"{service.url}{path}", timeout=10).status_code == 200
        replies = [call.result() for call in calls]
        for reply in replies:
            assert (reply.status_code, reply.json()) == (503, OVERLOADED)
            assert reply.headers["Retry-After"] == "1"
        *at_once, first, second, third = sorted(reply.elapsed.total_seconds() for reply in replies)
        assert at_once[-1] < PATIENCE <= first <= second <= third < PATIENCE + 5
    assert service.metric("notifications_refused_total") == 15
    assert service.metric("notification_wait_seconds_count") >= 3
    assert service.metric("notification_places") == 3
    assert service.metric("notifications_total") == 3  # refused requests do not count
    refused = [line for line in service.lines() if line.get("status") == 503]
    assert len(refused) == 15
    assert {line["level"] for line in refused} == {"WARNING"}


def test_waiting_notifications_are_delivered_in_order_of_arrival(
    start: StartService, email: Turnstile, pool: ThreadPoolExecutor
) -> None:
    service = start(3)
    titles = ["one", "two", "three"]
    with taken(service, email, 3):
        replies = []
        for number, title in enumerate(titles):
            replies.append(pool.submit(service.notify, json=MESSAGE | {"title": title}))
            eventually(lambda number=number: in_progress(service) == 4 + number)
        for _ in titles:
            email.let(1)
            email.wait_for(1)
    assert [reply.result().status_code for reply in replies] == [200] * 3
    assert email.titles[3:] == titles
    assert service.metric("notifications_refused_total") == 0
    assert service.metric("notification_wait_seconds_count") >= 3


def test_a_caller_that_leaves_while_waiting_does_not_leak_a_place(
    start: StartService, email: Turnstile
) -> None:
    service = start(1)
    with taken(service, email, 1):
        with socket.create_connection(("127.0.0.1", service.port)) as sock:
            sock.sendall(post(json.dumps(MESSAGE).encode()))
            eventually(lambda: in_progress(service) == 2)
        email.let(1)
        email.wait_for(1)  # delivered although the caller has left
        email.let(1)
        eventually(lambda: in_progress(service) == 0)
    assert service.notify().status_code == 200


def test_with_a_seller_in_every_place_both_channels_of_each_run_at_once(
    start: StartService, make_provider: MakeProvider, add_provider: AddProvider, email: Turnstile
) -> None:
    push = Turnstile()
    add_provider(make_provider(push).url, "PushNotification")
    service = start(3)
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(service.notify, "seller") for _ in range(3)]
        try:
            email.wait_for(3)
            push.wait_for(3)
        finally:
            email.let(3)
            push.let(3)
        assert [reply.result().status_code for reply in replies] == [200] * 3


# --- refused requests on the wire


def post(body: bytes, length: int | None = None) -> bytes:
    """Return a raw notification request; `length` may announce a longer body."""
    lines = [f"POST {NOTIFY} HTTP/1.1", "Host: x", f"Content-Length: {length or len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_refused_caller_can_reuse_its_connection(
    start: StartService, email: Turnstile, pool: ThreadPoolExecutor
) -> None:
    service = start(1)
    caller = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    body = json.dumps(MESSAGE)
    with taken(service, email, 1):
        waiting = pool.submit(service.notify)
        eventually(lambda: in_progress(service) == 2)
        caller.connect()
        kept = caller.sock
        for _ in range(3):
            caller.request("POST", NOTIFY, body)  # head and body in two pieces
            reply = caller.getresponse()
            assert (reply.status, json.loads(reply.read())) == (503, OVERLOADED)
            assert caller.sock is kept
        assert not waiting.done()  # so the caller was refused at once
    caller.request("POST", NOTIFY, body)
    assert caller.getresponse().status == 200
    assert caller.sock is kept
    caller.close()


def test_a_caller_whose_body_does_not_arrive_gets_a_reply_and_no_reset(
    start: StartService, email: Turnstile
) -> None:
    service = start(1)
    with taken(service, email, 1), ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=20))
            for _ in range(12)
        ]
        for sock in socks:
            sock.sendall(post(b"{", length=1000))
        with within(3 * REQUEST_SECONDS):
            for sock in socks:
                assert until_the_end(sock).startswith(b"HTTP/1.1 422 ")
        for sock in socks:  # too late, but must not cause a reset
            sock.sendall(b" " * 999)
        assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200
        for sock in socks:
            assert sock.recv(65536) == b""


def test_the_wait_for_a_thread_counts(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> None:
    """The worker is stopped while a request arrives, as if it were busy."""
    add_provider(make_provider().url)
    service = start_service(
        WEB_CONCURRENCY="1", HTTP_CLIENT_TIMEOUT="1s", NOTIFY_DEADLINE="1s"
    ).wait_until_listening()
    (worker,) = service.booted()
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as sock:
        worker.suspend()
        eventually(lambda: worker.status() == psutil.STATUS_STOPPED)
        sock.sendall(post(json.dumps(MESSAGE).encode()))
        time.sleep(1.5)  # the time that is measured
        worker.resume()
        assert sock.recv(65536).startswith(b"HTTP/1.1 503 ")
    assert service.metric("notification_wait_seconds_count") == 1
    assert service.metric("notification_wait_seconds_sum") >= 1.4
    (line,) = [line for line in service.lines() if line.get("status") == 503]
    assert line["reason"] == "no time left"
    assert line["duration_ms"] >= 1400
    assert service.notify().status_code == 200
