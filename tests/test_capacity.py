"""How many notifications run, who waits for how long, who is refused, and who is answered still."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from notifier import capacity as capacity_module
from notifier.capacity import Capacity
from notifier.errors import Overloaded
from tests.fixtures import Growth, MakeProvider
from tests.scripted_provider import Peer, Received, answer
from tests.service import MESSAGE, Service
from tests.sockets import until_the_end
from tests.timing import eventually, within

StartService = Callable[..., Service]
AddProvider = Callable[..., int]

LONG = 60.0  # a test in which it is waited out fails
SHORT = 0.02
PATIENCE = 1.0  # of the service
NOTIFY = "/api/v1.0/recipient/buyer/notify"
OVERLOADED = {"error": {"code": "E106", "message": "too many requests, try again later"}}


def take(capacity: Capacity, places: int = 1) -> None:
    for _ in range(places):
        capacity.__enter__()


def give(capacity: Capacity, places: int = 1) -> None:
    for _ in range(places):
        capacity.__exit__()


def is_as_new(capacity: Capacity, places: int) -> bool:
    return capacity._free == places and not capacity._waiting


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


def queue(pool: ThreadPoolExecutor, capacity: Capacity, then: Callable[[], None]) -> "Future[None]":
    """Let a thread wait for a place, and do `then` once it has it; return when it waits."""

    def wait() -> None:
        take(capacity)
        then()

    already = len(capacity._waiting)
    waiting = pool.submit(wait)
    eventually(lambda: len(capacity._waiting) == already + 1)
    return waiting


# --- the places


def test_as_many_as_there_are_places_come_in_at_once(growth: Growth) -> None:
    capacity = Capacity(3, LONG)
    take(capacity, 3)
    assert growth("notification_wait_seconds_count") == {}


def test_as_many_may_wait_and_the_next_is_refused_at_once(
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


def test_who_waits_comes_in_by_order_of_arrival_and_nobody_overtakes(
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


def test_who_has_waited_long_enough_is_refused_and_leaves_the_queue(growth: Growth) -> None:
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


def test_who_leaves_the_queue_leaves_the_others_their_turn(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = Capacity(2, LONG)
    take(capacity, 2)
    came: list[str] = []
    patience_ends = threading.Event()

    class Turn:
        """Never comes; the wait for it ends when the test says so."""

        def acquire(self, timeout: float | None = None) -> bool:
            return timeout is None or not patience_ends.wait(timeout)

    with monkeypatch.context() as patch:
        patch.setattr(capacity_module, "threading", SimpleNamespace(Lock=Turn))
        impatient = queue(pool, capacity, lambda: came.append("impatient"))
    patient = queue(pool, capacity, lambda: came.append("patient"))
    patience_ends.set()
    with pytest.raises(Overloaded):
        impatient.result(LONG / 10)
    give(capacity)
    patient.result(LONG / 10)
    assert came == ["patient"]


def test_a_place_that_is_handed_over_as_the_patience_ends_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, growth: Growth
) -> None:
    capacity = Capacity(1, SHORT)
    take(capacity)

    class Turn:
        """Comes after the wait for it, and before that has been noticed."""

        def acquire(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                give(capacity)
            return timeout is None

        def release(self) -> None:
            """Tell nobody: whom it would tell no longer waits."""

    monkeypatch.setattr(capacity_module, "threading", SimpleNamespace(Lock=Turn))
    take(capacity)
    assert growth("notifications_refused_total") == {}
    assert growth("notification_wait_seconds_count") == {(): 1}
    give(capacity)
    assert is_as_new(capacity, 1)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_place_is_given_back_whatever_happens(error: type[BaseException] | None) -> None:
    capacity = Capacity(1, SHORT)
    for _ in range(3):
        with ExitStack() as expected:
            if error:
                expected.enter_context(pytest.raises(error))
            with capacity:
                assert not is_as_new(capacity, 1)
                if error:
                    raise error
        assert is_as_new(capacity, 1)


def test_under_pressure_no_place_is_lost_or_taken_twice() -> None:
    places, threads = 3, 12
    capacity = Capacity(places, 0.001)
    inside, most = [0], [0]
    guard = threading.Lock()

    def press(_: int) -> tuple[int, int]:
        came = refused = 0
        for _ in range(300):
            try:
                with capacity:
                    with guard:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    came += 1
                    threading.Event().wait(0.0005)
                    with guard:
                        inside[0] -= 1
            except Overloaded:
                refused += 1
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
    """A provider's script that answers one request for each that is let through.

    `titles` has those of the messages in the order in which they came.
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
    """The only e-mail provider."""
    turnstile = Turnstile()
    add_provider(make_provider(turnstile).url)
    yield turnstile
    turnstile.let(1000)


@pytest.fixture
def start(start_service: StartService) -> StartService:
    """Start a service of one worker whose providers may take their time."""
    return lambda threads: start_service(
        WEB_CONCURRENCY="1",
        WEB_THREADS=str(threads),
        HTTP_CLIENT_TIMEOUT="30s",
        LOG_LEVEL="INFO",
    ).wait_until_listening()


@contextmanager
def taken(service: Service, email: Turnstile, places: int) -> Iterator[list[Any]]:
    """Have `places` notifications under way; they are delivered at the end."""
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


def test_beyond_its_capacity_a_worker_refuses_at_once_and_answers_its_operators(
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
    assert service.metric("notification_wait_seconds_count") == 3
    assert service.metric("notification_places") == 3
    assert service.metric("notifications_total") == 3  # what was refused was none
    refused = [line for line in service.lines() if line.get("status") == 503]
    assert len(refused) == 15
    assert {line["level"] for line in refused} == {"WARNING"}


def test_who_waits_is_delivered_by_order_of_arrival_once_others_have_been(
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
    assert service.metric("notification_wait_seconds_count") == 3


def test_a_caller_that_leaves_while_it_waits_takes_no_place_with_it(
    start: StartService, email: Turnstile
) -> None:
    service = start(1)
    with taken(service, email, 1):
        with socket.create_connection(("127.0.0.1", service.port)) as sock:
            sock.sendall(post(json.dumps(MESSAGE).encode()))
            eventually(lambda: in_progress(service) == 2)
        email.let(1)
        email.wait_for(1)  # delivered, though nobody waits for the answer
        email.let(1)
        eventually(lambda: in_progress(service) == 0)
    assert service.notify().status_code == 200


def test_each_of_as_many_sellers_as_there_are_places_has_both_channels_under_way_at_once(
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


# --- what is refused, on the wire


def post(body: bytes, length: int | None = None) -> bytes:
    """Return a request for a notification, which may say that more is to come of its body."""
    lines = [f"POST {NOTIFY} HTTP/1.1", "Host: x", f"Content-Length: {length or len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_refused_caller_goes_on_using_its_connection(
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


def test_a_refused_caller_whose_body_does_not_come_can_read_why_and_is_left(
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
        with within(5):
            for sock in socks:
                assert until_the_end(sock).startswith(b"HTTP/1.1 503 ")
        for sock in socks:  # too late, and no reason for a reset
            sock.sendall(b" " * 999)
        assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200
        for sock in socks:
            assert sock.recv(65536) == b""
