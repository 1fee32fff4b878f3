"""One attempt: what each answer means for the message, the endpoint's breaker and the log."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import responses
from pybreaker import CircuitBreakerError
from requests.adapters import HTTPAdapter

from notifier import logs
from notifier.app import create_app
from notifier.attempts import Attempts
from notifier.breakers import Breaker, Breakers, Call, Policy
from notifier.errors import AttemptFailed, Fault, TransportError
from notifier.models import Message, Provider
from notifier.wire.exchange import Answer
from notifier.wire.transport import Transport
from tests.fixtures import Growth, MakeSettings, MakeTransport
from tests.sockets import refusing

URL = "https://mail.example.com/v1/send"
HOST = "mail.example.com:443"
SECRET = "s3cr3t-key"
MESSAGE = Message("buyer@example.com", "Your order \u2713", "It is on its way")
POLICY = Policy(
    max_half_open=5, open_seconds=60.0, min_calls=3, failure_percent=60, window_seconds=60.0
)
TIMEOUT = 5.0


def make_provider(url: str = URL, secret_key: str | None = SECRET) -> Provider:
    return Provider.from_row((7, "Email", "mailer", url, secret_key))


class RecordingBreakers(Breakers):
    """Admits every call and keeps its record: True a failure, False a success, None neither."""

    def __init__(self) -> None:
        super().__init__(POLICY)
        self.calls: list[tuple[str, Call]] = []

    @property
    def recorded(self) -> list[tuple[str, bool | None]]:
        return [(host, call.failed) for host, call in self.calls]

    def of(self, host: str) -> Any:
        return SimpleNamespace(calling=lambda: self._calling(host))

    @contextmanager
    def _calling(self, host: str) -> Iterator[Call]:
        self.calls.append((host, Call(0)))
        yield self.calls[-1][1]


class FailingTransport(Transport):
    """Ends every exchange with a TransportError of `fault`."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self.deadlines: list[float] = []

    def post(self, url: str, body: bytes, headers: Any, deadline: float, *_: Any) -> Answer:
        self.deadlines.append(deadline)
        raise TransportError(self._fault)


@pytest.fixture(scope="module")
def transport() -> Iterator[Transport]:
    """A transport with requests' own adapter, so that `responses` can mock its answers."""
    transport = Transport(None, {}, connections=2, user_agent="notifier/test")
    for scheme in ("http://", "https://"):
        transport._session.mount(scheme, HTTPAdapter())
    yield transport
    transport.close()


@pytest.fixture
def breakers() -> RecordingBreakers:
    return RecordingBreakers()


@pytest.fixture
def attempts(transport: Transport, breakers: RecordingBreakers) -> Attempts:
    return Attempts(transport, breakers, TIMEOUT)


@pytest.fixture
def answers() -> Iterator[responses.RequestsMock]:
    """The mocked answers; a request to any other URL fails."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="notifier")


def send(attempts: Attempts, provider: Provider | None = None, deadline: float = 60.0) -> None:
    """Make one attempt in a request that has `deadline` seconds left."""
    attempts.send(provider or make_provider(), MESSAGE, time.monotonic() + deadline)


def failure(attempts: Attempts, *args: Any, **kwargs: Any) -> AttemptFailed:
    with pytest.raises(AttemptFailed) as raised:
        send(attempts, *args, **kwargs)
    return raised.value


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records above DEBUG; fail if any record holds a text, a secret or a path."""
    for record in caplog.records:
        shown = repr(record.__dict__)
        for hidden in (SECRET, MESSAGE.to, MESSAGE.title, MESSAGE.message, "/v1/send"):
            assert hidden not in shown
    return [record for record in caplog.records if record.levelno > logging.DEBUG]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 226, 299])
def test_a_2xx_means_accepted_and_is_a_success_for_the_breaker(
    status: int,
    attempts: Attempts,
    breakers: RecordingBreakers,
    answers: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers.post(URL, status=status)
    send(attempts)
    assert len(answers.calls) == 1
    assert breakers.recorded == [(HOST, False)]
    assert logged(caplog) == []


REFUSALS = [
    *[(status, "rejected", False) for status in (300, 301, 302, 303, 304, 307, 308, 399)],
    *[(status, "rejected", False) for status in (400, 401, 402, 403, 404, 405, 406, 407, 409, 410)],
    *[(status, "rejected", False) for status in (411, 413, 414, 415, 422, 424, 426, 451, 499)],
    *[(status, "not_sent", True) for status in (408, 425, 429)],
    *[(status, "unknown", True) for status in (500, 501, 502, 503, 504, 507, 599, 600, 999)],
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: str(refusal[0]))
def test_each_other_status_has_its_outcome_and_is_logged_as_a_warning(
    refusal: tuple[int, str, bool],
    attempts: Attempts,
    breakers: RecordingBreakers,
    answers: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    status, outcome, endpoint_failed = refusal
    answers.post(URL, status=status)
    failed = failure(attempts)
    assert (failed.outcome, failed.reason) == (outcome, str(status))
    assert len(answers.calls) == 1
    assert breakers.recorded == [(HOST, endpoint_failed)]
    (record,) = logged(caplog)
    assert record.levelname == "WARNING"
    fields = ("channel", "provider", "provider_id", "host", "outcome", "reason")
    assert [record.__dict__[name] for name in fields] == [
        *("Email", "mailer", 7, HOST),
        *(outcome, str(status)),
    ]


@pytest.mark.parametrize(
    ("kind", "outcome", "endpoint_failed"),
    [
        ("url", "skipped", None),
        ("dns", "not_sent", True),
        ("connect", "not_sent", True),
        ("tls", "not_sent", True),
        ("proxy", "not_sent", True),
        ("shortage", "not_sent", None),
        ("timeout", "unknown", True),
        ("reset", "unknown", True),
        ("protocol", "unknown", True),
    ],
)
def test_each_fault_has_its_outcome_and_is_logged_as_an_error(
    kind: str,
    outcome: str,
    endpoint_failed: bool | None,
    breakers: RecordingBreakers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = failure(Attempts(FailingTransport(Fault(kind)), breakers, TIMEOUT))
    assert (failed.outcome, failed.reason) == (outcome, kind)
    assert breakers.recorded == [(HOST, endpoint_failed)]
    (record,) = logged(caplog)
    assert record.levelname == "ERROR"
    assert (record.__dict__["host"], record.__dict__["reason"]) == (HOST, kind)


def test_a_failed_attempt_is_logged_with_the_systems_words(
    make_transport: MakeTransport, breakers: RecordingBreakers, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing() as port:
        attempts = Attempts(make_transport(), breakers, TIMEOUT)
        failed = failure(attempts, make_provider(f"http://user:{SECRET}@127.0.0.1:{port}/v1/send"))
    assert (failed.reason, failed.detail) == ("connect", "connection refused")
    (record,) = logged(caplog)
    assert record.__dict__["detail"] == "connection refused"


@pytest.mark.parametrize(
    "kind", ["dns", "connect", "tls", "proxy", "shortage", "timeout", "reset", "protocol"]
)
def test_an_attempt_cut_short_by_the_requests_deadline_records_nothing(
    kind: str, breakers: RecordingBreakers, caplog: pytest.LogCaptureFixture
) -> None:
    failed = failure(Attempts(FailingTransport(Fault(kind)), breakers, TIMEOUT), deadline=0.0)
    assert (failed.outcome, failed.reason) == ("unknown", "deadline")
    assert breakers.recorded == [(HOST, None)]
    (record,) = logged(caplog)
    assert (record.levelname, record.getMessage()) == ("ERROR", "attempt failed")
    assert (record.__dict__["outcome"], record.__dict__["reason"]) == ("unknown", "deadline")


def test_a_failure_before_the_deadline_counts_against_the_endpoint(
    breakers: RecordingBreakers,
) -> None:
    failed = failure(Attempts(FailingTransport(Fault.RESET), breakers, 7200.0), deadline=3600.0)
    assert failed.outcome == "unknown"
    assert breakers.recorded == [(HOST, True)]


@pytest.mark.parametrize(
    ("deadline", "reason", "endpoint_failed"),
    [(104.4, "deadline", None), (104.6, "timeout", True), (107.0, "timeout", True)],
)
def test_a_time_out_counts_against_the_endpoint_if_the_attempt_had_nearly_its_full_time(
    deadline: float,
    reason: str,
    endpoint_failed: bool | None,
    breakers: RecordingBreakers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 110.0, 110.0])  # before and after the exchange
    monkeypatch.setattr("notifier.attempts.time", SimpleNamespace(monotonic=lambda: next(clock)))
    attempts = Attempts(FailingTransport(Fault.TIMEOUT), breakers, TIMEOUT)
    with pytest.raises(AttemptFailed) as raised:
        attempts.send(make_provider(), MESSAGE, deadline)
    assert (raised.value.outcome, raised.value.reason) == ("unknown", reason)
    assert breakers.recorded == [(HOST, endpoint_failed)]


@pytest.mark.parametrize(("deadline", "given"), [(103.0, 103.0), (105.0, 105.0), (160.0, 105.0)])
def test_an_attempt_ends_at_its_time_out_or_at_the_requests_deadline(
    deadline: float, given: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifier.attempts.time", SimpleNamespace(monotonic=lambda: 100.0))
    transport = FailingTransport(Fault.CONNECT)
    with pytest.raises(AttemptFailed):
        Attempts(transport, RecordingBreakers(), TIMEOUT).send(make_provider(), MESSAGE, deadline)
    assert transport.deadlines == [given]


@pytest.mark.parametrize(
    "url", ["mail.example.com/send", "ftp://mail.example.com/", "nonsense", ""]
)
def test_an_invalid_url_is_skipped_with_an_error_before_the_breaker_is_asked(
    url: str,
    attempts: Attempts,
    breakers: RecordingBreakers,
    answers: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        failed = failure(attempts, make_provider(url))
        assert (failed.outcome, failed.reason) == ("skipped", "url")
    assert len(answers.calls) == 0
    assert breakers.calls == []
    (record,) = logged(caplog)  # at most one a second
    assert (record.levelname, record.getMessage()) == ("ERROR", "provider skipped")
    assert record.__dict__["provider_id"] == 7


def test_a_url_that_only_the_http_library_refuses_is_skipped_and_records_nothing(
    make_transport: MakeTransport, breakers: RecordingBreakers
) -> None:
    attempts = Attempts(make_transport(), breakers, TIMEOUT)
    failed = failure(attempts, make_provider("http://*.example.com/"))
    assert (failed.outcome, failed.reason) == ("skipped", "url")
    assert breakers.recorded == [("*.example.com:80", None)]


SKIPPED_LINE = {
    "channel": "Email",
    "provider": "mailer",
    "provider_id": 7,
    "host": HOST,
    "outcome": "skipped",
    "reason": "open",
    "detail": None,
    "times": 1,
}


def test_while_the_breaker_is_open_nothing_is_sent_and_no_call_counted(
    transport: Transport,
    answers: responses.RequestsMock,
    caplog: pytest.LogCaptureFixture,
    growth: Growth,
) -> None:
    answers.post(URL, status=503)
    attempts = Attempts(transport, Breakers(POLICY), TIMEOUT)
    outcomes = [failure(attempts).outcome for _ in range(5)]
    assert outcomes == ["unknown"] * 3 + ["skipped"] * 2
    assert len(answers.calls) == 3
    *failures, refused = logged(caplog)
    assert "provider skipped" not in {record.getMessage() for record in failures}
    assert (refused.levelname, refused.getMessage()) == ("WARNING", "provider skipped")
    assert refused.__dict__.items() >= SKIPPED_LINE.items()
    for name in ("http_client_requests_total", "http_client_duration_seconds_count"):
        assert growth(name) == {("POST", HOST, "503", ""): 3}


def test_the_refusals_of_each_provider_are_logged(
    transport: Transport, answers: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    answers.post(URL, status=503)
    attempts = Attempts(transport, Breakers(POLICY), TIMEOUT)
    for _ in range(3):
        failure(attempts)
    for provider_id in (7, 8):
        with pytest.raises(AttemptFailed):
            attempts.send(replace(make_provider(), id=provider_id), MESSAGE, math.inf)
    refused = [one for one in logged(caplog) if one.getMessage() == "provider skipped"]
    assert [record.__dict__["provider_id"] for record in refused] == [7, 8]


@pytest.mark.parametrize(
    "kind", ["dns", "connect", "tls", "proxy", "shortage", "timeout", "reset", "protocol"]
)
@pytest.mark.parametrize("deadline", [3600.0, 0.0], ids=["in time", "cut short"])
def test_a_call_without_an_answer_is_counted_by_its_fault(
    kind: str, deadline: float, breakers: RecordingBreakers, growth: Growth
) -> None:
    failure(Attempts(FailingTransport(Fault(kind)), breakers, TIMEOUT), deadline=deadline)
    for name in ("http_client_requests_total", "http_client_duration_seconds_count"):
        assert growth(name) == {("POST", HOST, "", kind): 1}


def test_an_invalid_url_is_not_counted_as_a_call(
    breakers: RecordingBreakers, growth: Growth
) -> None:
    attempts = Attempts(FailingTransport(Fault.URL), breakers, TIMEOUT)
    failure(attempts)
    failure(attempts, make_provider("ftp://mail.example.com"))
    assert growth("http_client_requests_total") == {}


def test_an_unguarded_attempt_ignores_an_open_breaker_and_records_nothing(
    transport: Transport, answers: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    answers.post(URL, status=503)
    breakers = Breakers(POLICY)
    attempts = Attempts(transport, breakers, TIMEOUT)
    for _ in range(3):
        failure(attempts)
    caplog.clear()
    with pytest.raises(AttemptFailed) as raised:
        attempts.send_unguarded(make_provider(), MESSAGE)
    assert (raised.value.outcome, raised.value.status) == ("unknown", 503)
    answers.replace(responses.POST, URL, status=202)
    assert attempts.send_unguarded(make_provider(), MESSAGE) == 202
    assert breakers.of(HOST).state == "open"
    assert logged(caplog) == []


def test_an_unguarded_attempt_has_the_usual_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("notifier.attempts.time", SimpleNamespace(monotonic=lambda: 100.0))
    transport = FailingTransport(Fault.TIMEOUT)
    with pytest.raises(AttemptFailed) as raised:
        Attempts(transport, RecordingBreakers(), TIMEOUT).send_unguarded(make_provider(), MESSAGE)
    assert transport.deadlines == [105.0]
    assert (raised.value.outcome, raised.value.reason) == ("unknown", "timeout")
    assert raised.value.status is None


@pytest.mark.parametrize("url", ["nonsense", "http://mail.example.com:0/"])
def test_an_unguarded_attempt_at_an_invalid_url_is_skipped(
    url: str, attempts: Attempts, answers: responses.RequestsMock
) -> None:
    with pytest.raises(AttemptFailed) as raised:
        attempts.send_unguarded(make_provider(url), MESSAGE)
    assert (raised.value.outcome, raised.value.reason) == ("skipped", "url")
    assert len(answers.calls) == 0


def test_an_open_breaker_does_not_affect_other_endpoints(
    transport: Transport, answers: responses.RequestsMock
) -> None:
    other = "https://other.example.com/v1/send"
    answers.post(URL, status=503)
    answers.post(other, status=202)
    attempts = Attempts(transport, Breakers(POLICY), TIMEOUT)
    for _ in range(4):
        failure(attempts)
    send(attempts, make_provider(other))
    assert [call.request.url for call in answers.calls] == [URL, URL, URL, other]


def test_providers_with_one_endpoint_share_its_breaker(
    transport: Transport, answers: responses.RequestsMock
) -> None:
    urls = [URL, "https://MAIL.example.com/other", "https://mail.example.com:443/third"]
    for url in urls:
        answers.post(url, status=500)
    attempts = Attempts(transport, Breakers(POLICY), TIMEOUT)
    outcomes = [failure(attempts, make_provider(url)).outcome for url in [*urls, URL]]
    assert outcomes == ["unknown", "unknown", "unknown", "skipped"]


def test_a_refusal_by_the_breaker_raises_attempt_failed_and_not_the_librarys_error(
    transport: Transport, answers: responses.RequestsMock
) -> None:
    breakers = Breakers(POLICY)
    for _ in range(3):
        with breakers.of(HOST).calling() as call:
            call.record(failed=True)
    with pytest.raises(CircuitBreakerError), breakers.of(HOST).calling():
        pass
    failed = failure(Attempts(transport, breakers, TIMEOUT))
    assert (failed.outcome, failed.reason) == ("skipped", "open")
    assert failed.__suppress_context__
    assert len(answers.calls) == 0


@pytest.mark.parametrize(
    ("secret_key", "sent"), [(SECRET, SECRET), (None, ""), ("", ""), ("\u00fc", "\u00fc")]
)
def test_the_body_holds_the_message_and_the_providers_secret(
    secret_key: str | None, sent: str, attempts: Attempts, answers: responses.RequestsMock
) -> None:
    answers.post(URL)
    send(attempts, make_provider(secret_key=secret_key))
    body = answers.calls[0].request.body
    assert isinstance(body, bytes)
    assert json.loads(body.decode()) == {
        "to": MESSAGE.to,
        "title": MESSAGE.title,
        "message": MESSAGE.message,
        "secret_key": sent,
    }


def test_the_request_is_a_json_post_with_the_callers_request_id(
    attempts: Attempts, answers: responses.RequestsMock
) -> None:
    answers.post(URL)
    token = logs.request_id.set("req-42")
    try:
        send(attempts)
    finally:
        logs.request_id.reset(token)
    request = answers.calls[0].request
    assert (request.method, request.url) == ("POST", URL)
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["X-Request-Id"] == "req-42"
    assert "Authorization" not in request.headers


def test_outside_a_request_no_request_id_is_sent(
    attempts: Attempts, answers: responses.RequestsMock
) -> None:
    answers.post(URL)
    send(attempts)
    assert "X-Request-Id" not in answers.calls[0].request.headers


def test_cookies_are_not_kept(attempts: Attempts, answers: responses.RequestsMock) -> None:
    answers.post(URL, headers={"Set-Cookie": "session=1; Path=/"})
    send(attempts)
    send(attempts)
    assert [call.request.headers.get("Cookie") for call in answers.calls] == [None, None]


def test_the_settings_of_the_breakers_and_of_the_attempt_reach_them(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(
        http_client_timeout=1.5,
        circuit_breaker_max_half_open_requests=2,
        circuit_breaker_open_state_timeout=3.5,
        circuit_breaker_min_requests_before_trip=4,
        circuit_breaker_failure_threshold_percent=55,
        circuit_breaker_window=6.5,
    )
    attempts = create_app(settings).extensions["notifier"].delivery._attempts
    breaker: Breaker = attempts._breakers.of(HOST)
    assert breaker._policy == Policy(2, 3.5, 4, 55, 6.5)
    assert attempts._timeout == 1.5
