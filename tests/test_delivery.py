"""Delivery through real providers: their order, the outcomes, the breakers and the deadline."""

import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from notifier import logs
from notifier.attempts import Attempts
from notifier.breakers import Breakers, Policy
from notifier.delivery import ChannelResult, Delivery, Report
from notifier.errors import PreferencesUnavailable
from notifier.models import Channel, ChannelOutcome, Message, Provider, Recipient
from notifier.settings import MIN_DEADLINE, Settings
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.wire import streams
from tests.fixtures import Environment, Growth, MakeProvider, MakeTransport
from tests.scripted_provider import (
    Peer,
    Received,
    Script,
    answer,
    close,
    hang,
    reset,
)
from tests.sockets import LOOPBACK, descriptors_left, not_answering, refusing, silent
from tests.timing import within

MESSAGE = Message("buyer@example.com", "Hello", "It is on its way.")
TIMEOUT = 0.4  # seconds for one attempt, in tests that wait for it


def rows(*urls: str, channel: Channel = Channel.EMAIL) -> tuple[Provider, ...]:
    """Return providers named `email 1`, `email 2`, … as read from the database."""
    return tuple(
        Provider.from_row((number, channel.value, f"{channel.name.lower()} {number}", url, "key"))
        for number, url in enumerate(urls, 1)
    )


class Known:
    """Fixed preferences; for a channel without an entry they are unavailable."""

    def __init__(self, **providers: tuple[Provider, ...]) -> None:
        self._providers = providers

    def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        try:
            return self._providers[channel.name.lower()]
        except KeyError:
            raise PreferencesUnavailable from None


@dataclass
class Made:
    """A delivery, its breakers and its reports so far."""

    delivery: Delivery
    breakers: Breakers
    reports: list[Report]
    seconds: float  # until the deadline of a delivery

    def to(self, recipient: Recipient) -> bool:
        """Deliver to `recipient`; return True if it succeeded."""
        report = self.delivery.deliver(recipient, MESSAGE, time.monotonic() + self.seconds)
        self.reports.append(report)
        return report.outcome == "delivered"

    def recorded(self, endpoint: str) -> str:
        """Return what the breaker of `endpoint` has recorded."""
        totals = self.breakers.of(endpoint)._window.totals(time.monotonic())
        return {(0, 0): "nothing", (1, 0): "success", (1, 1): "failure"}[totals]


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def make(make_transport: MakeTransport, reports: list[Report]) -> Iterator[Callable[..., Made]]:
    """Make deliveries, by default with breakers that never open and with ample time."""
    with ExitStack() as stack:

        def make(
            preferences: Any, *, timeout: float = 5, deadline: float = 20, min_calls: int = 1000
        ) -> Made:
            breakers = Breakers(Policy(1, 60, min_calls, 50, 60))
            attempts = Attempts(make_transport(), breakers, timeout)
            delivery = Delivery(preferences, attempts, threads=8)
            stack.callback(delivery.close)
            return Made(delivery, breakers, reports, deadline)

        yield make


def described(result: ChannelResult) -> str:
    """Return `Email failed: email 1 unknown 503, email 2 skipped open`; times are only checked."""
    for one in result.providers:
        assert (one.ms is None) == (one.outcome == "skipped")
    tried = (" ".join(filter(None, (*one[:2], one.reason))) for one in result.providers)
    return f"{result.channel} {result.outcome}: {', '.join(tried)}"


@pytest.fixture
def results(reports: list[Report]) -> Callable[[], list[str]]:
    """Return how the channels of the last delivery ended, and each of their providers."""
    return lambda: [described(result) for result in reports[-1].channels]


def test_providers_are_asked_by_priority_and_then_by_id(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    database: Environment,
    add_provider: Callable[..., int],
) -> None:
    asked: list[str] = []

    def refuse(peer: Peer, received: Received) -> None:
        asked.append(received.json()["secret_key"])
        answer(400)(peer, received)

    for secret, priority in (("4th", 7), ("2nd", 0), ("3rd", 0), ("1st", -1)):
        add_provider(make_provider(refuse).url, priority=priority, secret_key=secret)
    add_provider(make_provider(refuse).url, "PushNotification", priority=-9, secret_key="other")
    preferences = Preferences(Database(Settings.from_env(database)), lifetime=60)
    assert not make(preferences).to(Recipient.BUYER)
    assert asked == ["1st", "2nd", "3rd", "4th"]


def test_the_provider_gets_the_contracts_body_and_headers(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    provider = make_provider()
    token = logs.request_id.set("the-request")
    try:
        assert make(Known(email=rows(provider.url))).to(Recipient.BUYER)
    finally:
        logs.request_id.reset(token)
    (received,) = provider.received
    assert (received.method, received.path) == ("POST", "/send")
    assert received.headers["content-type"] == "application/json"
    assert received.headers["x-request-id"] == "the-request"
    assert received.json() == {
        "to": MESSAGE.to,
        "title": MESSAGE.title,
        "message": MESSAGE.message,
        "secret_key": "key",
    }


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_accepted_and_no_other_provider_is_asked(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    status: int,
) -> None:
    first, second = make_provider(answer(status, b"")), make_provider()
    made = make(Known(email=rows(first.url, second.url)))
    assert made.to(Recipient.BUYER)
    assert (len(first.received), len(second.received)) == (1, 0)
    assert made.recorded(first.endpoint) == "success"
    assert results() == ["Email delivered: email 1 accepted"]


def after_the_status_line(data: bytes, then: Script) -> Script:
    def script(peer: Peer, received: Received) -> None:
        peer.send(b"HTTP/1.1 202 Accepted\r\n" + data)
        then(peer, received)

    return script


UNFINISHED: dict[str, Script] = {
    "no headers": after_the_status_line(b"", close),
    "a cut body": after_the_status_line(b"Content-Length: 100\r\n\r\n{}", close),
    "a reset body": after_the_status_line(b"Content-Length: 100\r\n\r\n{}", reset),
    "a body that drips": after_the_status_line(b"\r\n", lambda peer, _: peer.drip(b"x")),
    "headers that drip": after_the_status_line(b"", lambda peer, _: peer.drip(b"X-A: b\r\n")),
    "broken chunks": after_the_status_line(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", close),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_accepted_message_is_never_sent_twice_however_its_answer_ends(
    make: Callable[..., Made], make_provider: MakeProvider, name: str
) -> None:
    first, second = make_provider(UNFINISHED[name]), make_provider()
    made = make(Known(email=rows(first.url, second.url)), timeout=TIMEOUT)
    assert made.to(Recipient.BUYER)
    assert (len(first.received), len(second.received)) == (1, 0)
    assert made.recorded(first.endpoint) == "success"


FALLS_BACK: dict[str, tuple[Script, str, str]] = {
    "hangs": (hang, "failure", "unknown timeout"),
    "drips": (lambda peer, _: peer.drip(b"HTTP/1.1 200 O"), "failure", "unknown timeout"),
    "resets": (reset, "failure", "unknown reset"),
    "closes": (close, "failure", "unknown reset"),
    "answers garbage": (
        lambda peer, _: peer.send(b"garbage\r\n\r\n"),
        "failure",
        "unknown protocol",
    ),
    "500": (answer(500), "failure", "unknown 500"),
    "502": (answer(502), "failure", "unknown 502"),
    "503": (answer(503, b"{}", "Retry-After: 1"), "failure", "unknown 503"),
    "599": (answer(599), "failure", "unknown 599"),
    "600": (answer(600), "failure", "unknown 600"),
    "408": (answer(408), "failure", "not_sent 408"),
    "425": (answer(425), "failure", "not_sent 425"),
    "429": (answer(429, b"{}", "Retry-After: 1"), "failure", "not_sent 429"),
    "300": (answer(300), "success", "rejected 300"),
    "301": (answer(301, b"{}", "Location: /elsewhere"), "success", "rejected 301"),
    "307": (answer(307, b"{}", "Location: http://["), "success", "rejected 307"),
    "400": (answer(400), "success", "rejected 400"),
    "401": (answer(401, b"{}", 'WWW-Authenticate: Basic realm="x"'), "success", "rejected 401"),
    "404": (answer(404), "success", "rejected 404"),
    "418": (answer(418), "success", "rejected 418"),
    "499": (answer(499), "success", "rejected 499"),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_the_next_provider_is_asked_after_a_failed_attempt(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    name: str,
) -> None:
    script, recorded, ended = FALLS_BACK[name]
    first, second, third = make_provider(script), make_provider(), make_provider()
    made = make(Known(email=rows(first.url, second.url, third.url)), timeout=TIMEOUT)
    assert made.to(Recipient.BUYER)
    assert [len(p.received) for p in (first, second, third)] == [1, 1, 0]
    assert first.received[0].body == second.received[0].body
    assert made.recorded(first.endpoint) == recorded
    assert made.recorded(second.endpoint) == "success"
    assert results() == [f"Email delivered: email 1 {ended}, email 2 accepted"]


UNREACHABLE = {
    "refuses": "connect",
    "does not answer": "connect",
    "no such name": "dns",
    "no TLS": "tls",
    "not trusted": "tls",
}


@pytest.fixture(params=UNREACHABLE)
def unreachable(request: pytest.FixtureRequest, make_provider: MakeProvider) -> Iterator[str]:
    """The URL of a provider that cannot be reached."""
    with ExitStack() as stack:
        if request.param == "refuses":
            yield f"http://{LOOPBACK}:{stack.enter_context(refusing())}/send"
        elif request.param == "does not answer":
            yield f"http://{LOOPBACK}:{stack.enter_context(not_answering())}/send"
        elif request.param == "no such name":
            yield "http://does-not-exist.invalid:80/send"
        elif request.param == "no TLS":
            yield make_provider().url.replace("http:", "https:")
        else:
            yield make_provider(tls=request.getfixturevalue("certificate")[1]).url


def test_the_next_provider_is_asked_when_the_first_cannot_be_reached(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    unreachable: str,
    request: pytest.FixtureRequest,
    results: Callable[[], list[str]],
) -> None:
    second = make_provider()
    first_row, second_row = rows(unreachable, second.url)
    made = make(Known(email=(first_row, second_row)), timeout=TIMEOUT)
    assert made.to(Recipient.BUYER)
    assert len(second.received) == 1
    assert first_row.endpoint
    assert made.recorded(first_row.endpoint) == "failure"
    reason = UNREACHABLE[request.node.callspec.params["unreachable"]]
    assert results() == [f"Email delivered: email 1 not_sent {reason}, email 2 accepted"]


@pytest.mark.parametrize(
    "url", ["", "mail.example.com", "ftp://mail.example.com/", "http://", "http://a:99999/"]
)
def test_a_row_without_a_usable_url_is_skipped_with_an_error_in_the_log(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
    url: str,
) -> None:
    second = make_provider()
    made = make(Known(email=rows(url, second.url)))
    assert made.to(Recipient.BUYER)
    assert len(second.received) == 1
    assert list(made.breakers._by_endpoint) == [second.endpoint]
    assert results() == ["Email delivered: email 1 skipped url, email 2 accepted"]
    (error,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert (error.__dict__["provider_id"], error.__dict__["reason"]) == (1, "url")


def test_a_host_whose_breaker_is_open_is_skipped_and_its_breaker_records_nothing(
    make: Callable[..., Made], make_provider: MakeProvider, results: Callable[[], list[str]]
) -> None:
    first, second = make_provider(answer(503)), make_provider()
    made = make(Known(email=rows(first.url, second.url)), min_calls=1)
    assert made.to(Recipient.BUYER)
    assert made.breakers.of(first.endpoint).state == "open"
    for _ in range(3):
        assert made.to(Recipient.BUYER)
        assert results() == ["Email delivered: email 1 skipped open, email 2 accepted"]
    assert (len(first.received), len(second.received)) == (1, 4)
    assert made.recorded(first.endpoint) == "failure"  # the call that opened it


def test_the_log_fields_of_a_report_have_every_provider_that_was_tried(
    make: Callable[..., Made], make_provider: MakeProvider, reports: list[Report]
) -> None:
    def late(peer: Peer, received: Received) -> None:
        peer.pause(0.1)
        answer(503)(peer, received)

    first, second = make_provider(late), make_provider()
    made = make(Known(email=rows(first.url, "nonsense", second.url, second.url)))
    assert made.to(Recipient.BUYER)
    (entry,) = json.loads(json.dumps(reports[-1].log_fields()))
    took = [one.pop("ms", None) for one in entry["providers"]]
    assert entry == {
        "channel": "Email",
        "outcome": "delivered",
        "provider": "email 3",
        "attempts": 2,
        "skipped": 1,
        "providers": [
            {"provider": "email 1", "outcome": "unknown", "reason": "503"},
            {"provider": "email 2", "outcome": "skipped", "reason": "url"},
            {"provider": "email 3", "outcome": "accepted"},
        ],
    }
    assert isinstance(took[0], int)
    assert 100 <= took[0] < 2000
    assert took[1] is None
    assert 0 <= took[2] < 2000


def test_a_buyer_is_reached_by_email_only(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    email, push = make_provider(), make_provider()
    known = Known(email=rows(email.url), push=rows(push.url, channel=Channel.PUSH))
    assert make(known).to(Recipient.BUYER)
    assert (len(email.received), len(push.received)) == (1, 0)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def together(barrier: threading.Barrier) -> Script:
    """Return a script that answers 200 once all parties wait at the barrier, or else 500."""

    def script(peer: Peer, received: Received) -> None:
        try:
            barrier.wait(5)
        except threading.BrokenBarrierError:
            answer(500)(peer, received)
        else:
            answer(200)(peer, received)

    return script


def test_a_sellers_channels_run_in_parallel_with_the_same_request_id(
    make: Callable[..., Made], make_provider: MakeProvider, results: Callable[[], list[str]]
) -> None:
    script = together(threading.Barrier(2))
    email, push = make_provider(script), make_provider(script)
    made = make(Known(email=rows(email.url), push=rows(push.url, channel=Channel.PUSH)))
    token = logs.request_id.set("the-request")
    try:
        assert made.to(Recipient.SELLER)
    finally:
        logs.request_id.reset(token)
    for provider in (email, push):
        (received,) = provider.received
        assert received.headers["x-request-id"] == "the-request"
    assert results() == [
        "Email delivered: email 1 accepted",
        "PushNotification delivered: push 1 accepted",
    ]


def test_the_second_channels_of_several_requests_run_in_parallel(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    email, push = make_provider(), make_provider(together(threading.Barrier(3)))
    made = make(Known(email=rows(email.url), push=rows(push.url, channel=Channel.PUSH)))
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(made.to, [Recipient.SELLER] * 3))


@contextmanager
def no_thread_to_fan_out() -> Iterator[None]:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("fan-out"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        yield


def test_without_a_thread_for_it_the_second_channel_follows_the_first_in_the_same_thread(
    make: Callable[..., Made], make_provider: MakeProvider, results: Callable[[], list[str]]
) -> None:
    email, push = make_provider(), make_provider()
    made = make(Known(email=rows(email.url), push=rows(push.url, channel=Channel.PUSH)))
    with no_thread_to_fan_out():
        assert made.to(Recipient.SELLER)
    assert results() == [
        "Email delivered: email 1 accepted",
        "PushNotification delivered: push 1 accepted",
    ]
    assert made.to(Recipient.SELLER)
    made.delivery.close()  # the pool's queue still held the first notification's work
    assert (len(email.received), len(push.received)) == (2, 2)


def test_a_busy_thread_of_the_pool_does_not_repeat_the_second_channel_later(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    hanging, released = threading.Event(), threading.Event()

    def hang_once(peer: Peer, received: Received) -> None:
        if not hanging.is_set():
            hanging.set()
            released.wait(10)
        answer()(peer, received)

    email, push = make_provider(), make_provider(hang_once)
    made = make(Known(email=rows(email.url), push=rows(push.url, channel=Channel.PUSH)))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(made.to, Recipient.SELLER)
        assert hanging.wait(10)
        with no_thread_to_fan_out():
            assert made.to(Recipient.SELLER)
        released.set()
        assert first.result()
    made.delivery.close()
    assert (len(email.received), len(push.received)) == (2, 2)


@pytest.mark.parametrize("lack", ["descriptors", "a thread for the look-up"])
def test_our_own_shortage_is_neutral_for_the_breaker_and_the_next_provider_is_tried(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    growth: Growth,
    lack: str,
) -> None:
    first, second = make_provider(), make_provider()
    by_name = first.url.replace(LOOPBACK, "localhost")
    made = make(Known(email=rows(by_name, second.url)), min_calls=1)
    made.delivery._attempts.send(rows(second.url)[0], MESSAGE, time.monotonic() + 5)  # kept open
    with ExitStack() as stack:
        if lack == "descriptors":
            stack.enter_context(descriptors_left(0))
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                "notifier.wire.transport.WireAdapter._close_idle", lambda _: False
            )
        else:
            error = OSError(errno.ENOMEM, "can't start new thread")
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr("notifier.wire.connector.SingleFlight.run", raising(error))
        for _ in range(5):
            assert made.to(Recipient.BUYER)
    assert results() == ["Email delivered: email 1 not_sent shortage, email 2 accepted"]
    endpoint = first.endpoint.replace(LOOPBACK, "localhost")
    assert made.recorded(endpoint) == "nothing"
    assert growth("http_client_requests_total")["POST", endpoint, "", "shortage"] == 5
    assert made.to(Recipient.BUYER)
    assert results() == ["Email delivered: email 1 accepted"]


@pytest.mark.parametrize("failing", ["email", "push"])
@pytest.mark.parametrize("how", ["every provider fails", "no provider", "no preferences"])
def test_a_failed_channel_does_not_stop_the_other(
    make: Callable[..., Made], make_provider: MakeProvider, failing: str, how: str
) -> None:
    failed = threading.Event()

    def answer_late(peer: Peer, received: Received) -> None:
        failed.wait(0.3)  # never set: the other channel gets time to fail first
        answer(200)(peer, received)

    other = "push" if failing == "email" else "email"
    good = make_provider(answer_late)
    known = {other: rows(good.url, channel=Channel[other.upper()])}
    if how != "no preferences":
        bad = [make_provider(answer(500)).url] if how == "every provider fails" else []
        known[failing] = rows(*bad, channel=Channel[failing.upper()])
    made = make(Known(**known))
    assert not made.to(Recipient.SELLER)
    assert len(good.received) == 1
    assert made.recorded(good.endpoint) == "success"  # so it has been awaited


def test_without_a_provider_nothing_is_delivered(
    make: Callable[..., Made], results: Callable[[], list[str]]
) -> None:
    assert not make(Known(email=())).to(Recipient.BUYER)
    assert results() == ["Email no_provider: "]


def test_when_every_provider_fails_each_is_asked_once(
    make: Callable[..., Made], make_provider: MakeProvider, results: Callable[[], list[str]]
) -> None:
    providers = [make_provider(answer(status)) for status in (500, 404, 429)]
    assert not make(Known(email=rows(*(p.url for p in providers)))).to(Recipient.BUYER)
    assert [len(provider.received) for provider in providers] == [1, 1, 1]
    ended = "email 1 unknown 500, email 2 rejected 404, email 3 not_sent 429"
    assert results() == [f"Email failed: {ended}"]


def test_skipped_providers_are_not_counted_as_attempts_when_all_fail(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    reports: list[Report],
) -> None:
    provider = make_provider(answer(404))
    assert not make(Known(email=rows("ftp://a/", provider.url, "b"))).to(Recipient.BUYER)
    ended = "email 1 skipped url, email 2 rejected 404, email 3 skipped url"
    assert results() == [f"Email failed: {ended}"]
    (entry,) = reports[-1].log_fields()
    assert (entry["attempts"], entry["skipped"]) == (1, 2)


@pytest.mark.parametrize(
    ("statuses", "outcome", "channels", "fallbacks"),
    [
        (([200], [200]), "delivered", ["email 1", "push 1"], 0),
        (([500, 200], [503, 429, 201]), "delivered", ["email 2", "push 3"], 2),
        (([200], []), "no_provider", ["email 1", "no_provider"], 0),
        (([500], []), "no_provider", ["failed", "no_provider"], 0),
        (([200], [500]), "failed", ["email 1", "failed"], 0),
        (([400, 500], [500, 200]), "failed", ["failed", "push 2"], 1),
    ],
)
def test_a_notification_and_its_channels_are_counted_by_outcome(  # noqa: PLR0913
    make: Callable[..., Made],
    make_provider: MakeProvider,
    growth: Growth,
    *,
    statuses: tuple[list[int], list[int]],
    outcome: str,
    channels: list[str],
    fallbacks: int,
) -> None:
    """`statuses` are the providers'; `channels` has each delivering provider, or the outcome."""
    email, push = ([make_provider(answer(s)).url for s in of_channel] for of_channel in statuses)
    made = make(Known(email=rows(*email), push=rows(*push, channel=Channel.PUSH)))
    made.to(Recipient.SELLER)
    assert growth("notifications_total") == {("seller", outcome): 1}
    assert growth("notification_duration_seconds_count") == {("seller",): 1}
    assert growth("notification_channel_total") == {
        (channel, "", end) if end in list(ChannelOutcome) else (channel, end, "delivered"): 1
        for channel, end in zip(Channel, channels, strict=True)
    }
    assert sum(growth("notification_fallback_total").values()) == fallbacks


def test_a_delivered_channel_is_counted_although_an_unexpected_error_ends_the_other(
    make: Callable[..., Made], make_provider: MakeProvider, growth: Growth
) -> None:
    class Broken(Known):
        def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
            if channel is Channel.PUSH:
                raise RuntimeError
            return super().for_channel(channel, deadline)

    made = make(Broken(email=rows(make_provider().url)))
    with pytest.raises(RuntimeError):
        made.to(Recipient.SELLER)
    assert growth("notifications_total") == {("seller", "failed"): 1}
    assert growth("notification_duration_seconds_count") == {("seller",): 1}
    assert growth("notification_channel_total") == {("Email", "email 1", "delivered"): 1}


def test_unavailable_preferences_are_counted_as_a_failure(
    make: Callable[..., Made], growth: Growth
) -> None:
    make(Known()).to(Recipient.BUYER)
    assert growth("notifications_total") == {("buyer", "failed"): 1}
    assert growth("notification_channel_total") == {("Email", "", "failed"): 1}


def test_a_delivery_past_an_open_breaker_counts_as_a_fallback(
    make: Callable[..., Made], make_provider: MakeProvider, growth: Growth
) -> None:
    first, second = make_provider(answer(503)), make_provider()
    made = make(Known(email=rows(first.url, second.url)), min_calls=1)
    for _ in range(3):
        assert made.to(Recipient.BUYER)
    assert len(first.received) == 1
    assert growth("notification_fallback_total") == {("Email",): 3}


SLOW: list[Script] = [
    hang,
    lambda peer, _: peer.drip(b"HTTP/1.1 200 O"),
    lambda peer, _: peer.drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
]


@pytest.mark.parametrize("script", SLOW, ids=["hangs", "drips", "says Continue"])
def test_an_attempt_cut_short_by_the_deadline_is_the_last_and_records_nothing(
    make: Callable[..., Made],
    make_provider: MakeProvider,
    results: Callable[[], list[str]],
    script: Script,
) -> None:
    first, *others = make_provider(script), make_provider(), make_provider()
    made = make(Known(email=rows(first.url, *(p.url for p in others))), timeout=10, deadline=0.5)
    with within(3):
        assert not made.to(Recipient.BUYER)
    assert [len(provider.received) for provider in (first, *others)] == [1, 0, 0]
    assert made.recorded(first.endpoint) == "nothing"
    late = "email 2 skipped deadline, email 3 skipped deadline"
    assert results() == [f"Email failed: email 1 unknown deadline, {late}"]


@pytest.fixture(params=["look-up", "connect", "tls"])
def slow_to_reach(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL for which this step takes longer than any test."""
    released = threading.Event()

    def look_up(host: str, port: int, flags: int = 0) -> Any:
        if not flags:
            released.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "no address, or no name any more")

    with ExitStack() as stack:
        stack.callback(released.set)
        if request.param == "look-up":
            monkeypatch.setattr(streams, "look_up", look_up)
            yield "http://mail.example.com:80/send"
        elif request.param == "connect":
            yield f"http://{LOOPBACK}:{stack.enter_context(not_answering())}/send"
        else:
            yield f"https://{LOOPBACK}:{stack.enter_context(silent())}/send"


def test_an_attempt_cut_short_before_the_message_is_sent_records_nothing(
    make: Callable[..., Made], make_provider: MakeProvider, slow_to_reach: str
) -> None:
    second = make_provider()
    slow, then = rows(slow_to_reach, second.url)
    made = make(Known(email=(slow, then)), timeout=10, deadline=0.5)
    with within(3):
        assert not made.to(Recipient.BUYER)
    assert slow.endpoint
    assert (made.recorded(slow.endpoint), second.received) == ("nothing", [])


def test_with_less_than_a_quarter_of_a_second_left_no_attempt_is_begun(
    make: Callable[..., Made], make_provider: MakeProvider, results: Callable[[], list[str]]
) -> None:
    first, second = make_provider(hang), make_provider()
    made = make(Known(email=rows(first.url, second.url)), timeout=0.4, deadline=0.6)
    assert not made.to(Recipient.BUYER)
    assert (len(first.received), len(second.received)) == (1, 0)
    assert made.recorded(first.endpoint) == "failure"  # it had its full time
    assert results() == ["Email failed: email 1 unknown timeout, email 2 skipped deadline"]


def test_the_shortest_deadline_that_the_settings_accept_is_enough_for_an_attempt(
    make: Callable[..., Made], make_provider: MakeProvider, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(http_client_timeout=0.1, notify_deadline=MIN_DEADLINE)
    provider = make_provider()
    assert make(Known(email=rows(provider.url)), deadline=settings.notify_deadline).to(
        Recipient.BUYER
    )


def test_a_hanging_host_counts_as_failed_if_the_deadline_is_as_long_as_one_attempt(
    make: Callable[..., Made], make_provider: MakeProvider, make_settings: Callable[..., Settings]
) -> None:
    """Otherwise its breaker would never open, and every request would wait for it in vain."""
    settings = make_settings(http_client_timeout=0.4, notify_deadline=0.4)
    provider = make_provider(hang)
    made = make(Known(email=rows(provider.url)), timeout=0.4, deadline=settings.notify_deadline)
    assert not made.to(Recipient.BUYER)
    assert made.recorded(provider.endpoint) == "failure"


def test_the_other_channels_are_awaited_when_the_first_raises_an_unexpected_error(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    """Otherwise the caller would get an error while messages are still being sent."""
    asked = threading.Event()

    def slow(peer: Peer, received: Received) -> None:
        asked.set()
        peer.pause(0.3)
        answer()(peer, received)

    push = make_provider(slow)
    pushes = rows(push.url, channel=Channel.PUSH)

    class Broken:
        def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
            if channel is Channel.PUSH:
                return pushes
            assert asked.wait(10)
            raise ZeroDivisionError

    made = make(Broken())
    with pytest.raises(ZeroDivisionError):
        made.to(Recipient.SELLER)
    assert made.recorded(push.endpoint) == "success"


def test_the_deadline_bounds_all_attempts_of_all_channels_together(
    make: Callable[..., Made], make_provider: MakeProvider
) -> None:
    email = [make_provider(script) for script in SLOW * 3]
    push = [make_provider(script) for script in reversed(SLOW * 3)]
    known = Known(
        email=rows(*(provider.url for provider in email)),
        push=rows(*(provider.url for provider in push), channel=Channel.PUSH),
    )
    made = make(known, timeout=0.3, deadline=1)
    with within(3):
        assert not made.to(Recipient.SELLER)
    for providers in (email, push):
        assert [len(p.received) for p in providers] in ([1] * 3 + [0] * 6, [1] * 2 + [0] * 7)
