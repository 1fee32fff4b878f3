"""The sandbox without a browser: joining notifications, its HTTP interface and its command line."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from tests.service import ROOT
from tests.sockets import refusing, silent
from tests.timing import eventually, within
from tools.dev.json_handler import Methods
from tools.dev.mock_provider import ANSWERS, Message, MockProvider, ProviderHandler
from tools.dev.sandbox import Sandbox
from tools.dev.sandbox.__main__ import main
from tools.dev.sandbox.breakers import EVERY, Breakers, parse_states
from tools.dev.sandbox.notifications import Seen, Sent, joined, parse_line
from tools.dev.sandbox.server import FILES, FOLDER

TEXTS = {"to": "buyer@example.com", "title": "Hello", "message": "It is on its way."}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()
ROUTE = "/api/v1.0/recipient/<recipient>/notify"
SENT = {"recipient": "buyer", **TEXTS}


def stamp(seconds: float) -> str:
    """Return the time of day that is so many seconds after noon."""
    moment = datetime.fromtimestamp(NOON + seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def channel(name: str = "Email", *providers: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    counts = {"provider": None, "attempts": len(providers), "skipped": 0}
    return {"channel": name, "outcome": "delivered", **counts, "providers": providers, **fields}


def entry(ended: float = 0.010, request_id: str = "r-1", **fields: Any) -> dict[str, Any]:
    """Return a `request` line as the service logs it, of a request that took 10 ms."""
    return {
        "timestamp": stamp(ended),
        "level": "INFO",
        "message": "request",
        "request_id": request_id,
        "method": "POST",
        "route": ROUTE,
        "status": 200,
        "duration_ms": 10.0,
        "recipient": "buyer",
        "to": "b***@example.com",
        "channels": [channel("Email", ACCEPTED)],
        **fields,
    }


ACCEPTED = {"provider": "email 1", "outcome": "accepted", "ms": 3}
DOWN = {"provider": "email 1", "outcome": "unknown", "reason": "503", "ms": 12}
OPEN = {"provider": "email 1", "outcome": "skipped", "reason": "open"}
SECOND = {"provider": "email 2", "outcome": "accepted", "ms": 3}


def seen(
    at: float = 0.005, provider: str = "email 1", request_id: str = "r-1", **fields: str
) -> Seen:
    known = {**TEXTS, "secret_key": "3f***", "answer": "200 OK", **fields}
    return Seen(provider, Message(received_at=stamp(at), request_id=request_id, **known))


def shown(
    *entries: Mapping[str, Any], sent: tuple[Sent, ...] = (), seen: tuple[Seen, ...] = ()
) -> list[dict[str, Any]]:
    lines = [line for each in entries if (line := parse_line(each))]
    return joined(lines, sent, seen, 30)


def ways(notification: Mapping[str, Any]) -> list[str]:
    """Return the ways as the page writes them."""
    return [
        f"{way['channel']}: "
        + " → ".join(f"{step['provider']}: {step['text']}" for step in way["steps"])
        for way in notification["ways"]
    ]


class TestWays:
    @pytest.mark.parametrize(
        ("tried", "text", "tone"),
        [
            ({"outcome": "accepted", "ms": 3}, "accepted", "good"),
            ({"outcome": "unknown", "reason": "503", "ms": 3}, "503", "bad"),
            ({"outcome": "rejected", "reason": "404", "ms": 3}, "404", "bad"),
            ({"outcome": "not_sent", "reason": "429", "ms": 3}, "429", "bad"),
            ({"outcome": "not_sent", "reason": "connect", "ms": 3}, "no connection", "bad"),
            ({"outcome": "not_sent", "reason": "proxy", "ms": 3}, "proxy failed", "bad"),
            (
                {"outcome": "not_sent", "reason": "shortage"},
                "no free descriptor, port, thread or memory",
                "bad",
            ),
            ({"outcome": "unknown", "reason": "timeout", "ms": 5000}, "no answer in time", "bad"),
            ({"outcome": "unknown", "reason": "deadline"}, "cut short by the deadline", "bad"),
            ({"outcome": "unknown", "reason": "novel"}, "novel", "bad"),
            ({"outcome": "skipped", "reason": "open"}, "skipped, breaker open", "quiet"),
            ({"outcome": "skipped", "reason": "deadline"}, "skipped, no time left", "quiet"),
            ({"outcome": "skipped", "reason": "url"}, "skipped, URL cannot be used", "quiet"),
        ],
    )
    def test_every_outcome_has_its_words(self, tried: dict[str, Any], text: str, tone: str) -> None:
        (one,) = shown(entry(channels=[channel("Email", {"provider": "email 1", **tried})]))

        assert one["ways"] == [
            {"channel": "Email", "steps": ({"provider": "email 1", "text": text, "tone": tone},)}
        ]

    def test_each_channel_has_a_way(self) -> None:
        push = {"provider": "push 1", "outcome": "accepted", "ms": 2}
        channels = [channel("Email", DOWN, SECOND), channel("PushNotification", push)]

        (one,) = shown(entry(channels=channels))

        assert ways(one) == ["Email: email 1: 503 → email 2: accepted", "Push: push 1: accepted"]

    @pytest.mark.parametrize(
        ("outcome", "text"),
        [("no_provider", "no provider"), ("failed", "the providers could not be read")],
    )
    def test_a_channel_without_providers_says_why(self, outcome: str, text: str) -> None:
        (one,) = shown(entry(status=500, channels=[channel("Email", outcome=outcome)]))

        assert [step["text"] for step in one["ways"][0]["steps"]] == [text]

    def test_a_line_without_providers_leaves_the_way_to_what_they_saw(self) -> None:
        channels = [{"channel": "Email", "outcome": "delivered", "attempts": 1, "skipped": 1}]

        (one,) = shown(entry(channels=channels), seen=(seen(provider="email 2"),))

        assert ways(one) == ["Email: email 2: accepted"]


class TestJoining:
    def test_a_line_and_its_messages_are_one_notification(self) -> None:
        refused = seen(0.003, answer=ANSWERS["503"])
        taken = seen(0.006, "email 2")
        line = entry(channels=[channel("Email", DOWN, SECOND)])

        (one,) = shown(line, seen=(taken, refused))

        assert (one["title"], one["recipient"], one["status"]) == ("Hello", "buyer", 200)
        assert (one["result"], one["tone"], one["is_logged"]) == ("delivered", "good", True)
        assert one["at"] == stamp(0).replace("Z", "+00:00")
        assert [(each["provider"], each["answer"]) for each in one["received"]] == [
            ("email 1", "503 Service Unavailable"),
            ("email 2", "200 OK"),
        ]

    def test_a_notification_that_no_provider_received_has_no_title(self) -> None:
        (one,) = shown(entry(status=500, channels=[channel("Email", OPEN, outcome="failed")]))

        assert (one["title"], one["received"]) == (None, [])
        assert (one["result"], one["tone"]) == ("failed", "bad")

    @pytest.mark.parametrize(
        ("outcome", "may_have_arrived"),
        [
            ("accepted", True),
            ("unknown", True),
            ("rejected", False),
            ("not_sent", False),
            ("skipped", False),
        ],
    )
    def test_a_notification_without_a_title_may_have_reached_another_provider(
        self, outcome: str, may_have_arrived: bool
    ) -> None:
        tried = {"provider": "Acme Mail", "outcome": outcome, "reason": "open"}

        (one,) = shown(entry(channels=[channel("Email", tried)]))

        assert (one["title"], one["may_have_arrived"]) == (None, may_have_arrived)

    def test_the_form_gives_the_title_where_no_provider_received_it(self) -> None:
        sent = Sent("r-1", NOON, "buyer", **TEXTS, status=500)
        line = entry(status=500, channels=[channel("Email", OPEN, outcome="failed")])

        (one,) = shown(line, sent=(sent,))

        assert (one["title"], one["to"]) == ("Hello", "buyer@example.com")

    @pytest.mark.parametrize("status", [422, 503])
    def test_a_refusal_shows_its_reason(self, status: int) -> None:
        line = entry(status=status, reason="title: is missing")
        del line["channels"]

        (one,) = shown(line)

        assert (one["result"], one["status"]) == ("refused", status)
        assert (one["reason"], one["ways"]) == ("title: is missing", [])

    def test_an_unknown_recipient_is_none(self) -> None:
        line = entry(status=422)
        del line["recipient"], line["channels"]

        assert shown(line)[0]["recipient"] is None

    def test_notifications_with_the_same_id_are_told_apart_by_time(self) -> None:
        lines = [entry(0.010), entry(1.010), entry(2.010)]
        messages = (seen(0.005, title="a"), seen(1.005, title="b"), seen(2.005, title="c"))

        titles = [one["title"] for one in shown(*lines, seen=messages)]

        assert titles == ["c", "b", "a"]

    def test_a_late_fallback_belongs_to_the_notification_that_began_before_it(self) -> None:
        lines = [entry(0.950, duration_ms=950), entry(1.010)]
        messages = (seen(0.005), seen(0.940, "email 2"), seen(1.005))

        newer, older = shown(*lines, seen=messages)

        assert [each["provider"] for each in older["received"]] == ["email 1", "email 2"]
        assert [each["provider"] for each in newer["received"]] == ["email 1"]

    def test_notifications_with_the_same_id_at_the_same_time_get_a_message_each(self) -> None:
        lines = [entry(0.010), entry(0.011)]

        found = shown(*lines, seen=(seen(0.004), seen(0.005)))

        assert [len(one["received"]) for one in found] == [1, 1]

    def test_notifications_with_the_same_id_at_the_same_time_are_told_apart_by_address(
        self,
    ) -> None:
        lines = [
            entry(0.010 + number / 1000, recipient=recipient, to=f"{recipient[0]}***@example.com")
            for number, recipient in enumerate(("buyer", "seller"))
        ]
        for_buyer = seen(0.004, title="for buyer")
        for_seller = seen(0.005, title="for seller", to="seller@example.com")

        found = shown(*lines, seen=(for_buyer, for_seller))

        titles = {one["recipient"]: one["title"] for one in found}
        assert titles == {"buyer": "for buyer", "seller": "for seller"}

    @pytest.mark.parametrize("other", [(OPEN, SECOND), (SECOND,)])
    def test_notifications_with_the_same_id_at_the_same_time_are_told_apart_by_provider(
        self, other: tuple[Mapping[str, Any], ...]
    ) -> None:
        lines = [entry(0.010), entry(0.012, channels=[channel("Email", *other)])]

        newer, older = shown(*lines, seen=(seen(0.005), seen(0.006, "email 2")))

        assert [each["provider"] for each in newer["received"]] == ["email 2"]
        assert [each["provider"] for each in older["received"]] == ["email 1"]

    def test_a_message_of_a_provider_that_the_service_knows_by_another_name_is_joined(self) -> None:
        renamed = {**ACCEPTED, "provider": "Acme Mail"}

        (one,) = shown(entry(channels=[channel("Email", renamed)]), seen=(seen(),))

        assert one["title"] == "Hello"

    def test_a_line_that_dates_its_start_late_is_joined_all_the_same(self) -> None:
        """A busy machine may log a line long after it measured the duration."""
        (one,) = shown(entry(0.300), seen=(seen(0.005),))

        assert one["title"] == "Hello"

    def test_a_message_from_long_before_the_line_is_another_notifications(self) -> None:
        assert len(shown(entry(60.010), seen=(seen(0.005),))) == 2

    def test_a_message_that_comes_before_its_line_keeps_its_key(self) -> None:
        (early,) = shown(seen=(seen(),))
        (late,) = shown(entry(), seen=(seen(),))

        assert (early["is_logged"], late["is_logged"]) == (False, True)
        assert early["key"] == late["key"]

    def test_messages_without_an_id_are_notifications_of_their_own(self) -> None:
        messages = (seen(0.1, request_id=""), seen(0.2, "email 2", request_id=""))

        found = shown(seen=messages)

        assert len({one["key"] for one in found}) == 2

    def test_the_newest_come_first_and_no_more_than_asked_for(self) -> None:
        lines = [parse_line(entry(number, f"r-{number}")) for number in range(40)]

        found = joined([line for line in lines if line], (), (), 30)

        assert [one["request_id"] for one in found] == [f"r-{n}" for n in range(39, 9, -1)]

    @pytest.mark.parametrize(
        "fields",
        [{"message": "attempt failed"}, {"route": "/healthz"}, {"route": "unmatched"}],
    )
    def test_other_lines_are_ignored(self, fields: dict[str, str]) -> None:
        assert parse_line(entry(**fields)) is None
        assert parse_line(fields) is None


class TestWithoutALog:
    @pytest.mark.parametrize(
        ("answer", "text", "result"),
        [
            ("200 OK", "accepted", "accepted"),
            ("200 OK after 1.5 s", "accepted after 1.5 s", "accepted"),
            (ANSWERS["503"], "503", "not accepted"),
            (ANSWERS["429"], "429", "not accepted"),
            (ANSWERS["slow"], "waiting", "under way"),
            (ANSWERS["drop"], "connection dropped", "not accepted"),
            (
                "no answer: the client had left after 5.0 s",
                "the client had left after 5.0 s",
                "not accepted",
            ),
        ],
    )
    def test_the_way_is_what_the_providers_saw(self, answer: str, text: str, result: str) -> None:
        (one,) = shown(seen=(seen(answer=answer),))

        assert ways(one) == [f"Email: email 1: {text}"]
        assert (one["result"], one["status"], one["is_logged"]) == (result, None, False)

    def test_the_providers_of_a_channel_share_their_first_word(self) -> None:
        messages = (
            seen(0.001, answer=ANSWERS["503"]),
            seen(0.002, "push 1"),
            seen(0.003, "email 2"),
        )

        (one,) = shown(seen=messages)

        assert ways(one) == ["Email: email 1: 503 → email 2: accepted", "Push: push 1: accepted"]

    def test_a_provider_that_is_asked_again_began_another_notification(self) -> None:
        assert len(shown(seen=(seen(0.001), seen(0.002)))) == 2

    def test_other_texts_are_another_notifications(self) -> None:
        messages = (seen(0.001), seen(0.002, "email 2", title="Other"))

        assert len(shown(seen=messages)) == 2

    @pytest.mark.parametrize(("status", "result"), [(None, "under way"), (200, "delivered")])
    def test_the_forms_reply_gives_the_result(self, status: int | None, result: str) -> None:
        sent = Sent("r-1", NOON, "seller", **TEXTS, status=status)

        (one,) = shown(sent=(sent,), seen=(seen(),))

        assert (one["result"], one["recipient"]) == (result, "seller")


METRICS = """\
# HELP circuit_breaker_state 0 closed, 1 open, 2 half-open: the worst of the workers'.
# TYPE circuit_breaker_state gauge
circuit_breaker_state{host="127.0.0.1:9090",state="open"} 1.0
circuit_breaker_state{host="providers:9091",state="half-open"} 2.0
circuit_breaker_state{host="[::1]:9092",state="closed"} 0.0
# TYPE circuit_breaker_state_changes_total counter
circuit_breaker_state_changes_total{host="127.0.0.1:9092",from_state="closed",to_state="open"} 1.0
"""


class TestBreakers:
    def test_states_are_found_by_port(self) -> None:
        assert parse_states(METRICS) == {9090: "open", 9091: "half-open", 9092: "closed"}

    def test_the_worst_counts_where_two_hosts_share_a_port(self) -> None:
        lines = [
            f'circuit_breaker_state{{host="{host}:9090",state="{state}"}} 1.0\n'
            for host, state in (("a", "half-open"), ("b", "open"), ("c", "closed"))
        ]

        assert parse_states("".join(lines)) == {9090: "open"}

    def test_a_page_without_breakers_has_no_state(self) -> None:
        assert parse_states("") == {}

    def test_the_metrics_are_read_twice_a_second_at_most(self, service: MockProvider) -> None:
        now = [0.0]
        breakers = Breakers(service.url.rstrip("/"), clock=lambda: now[0])
        first = breakers.states()
        service.stop()
        now[0] = EVERY - 0.01
        again = breakers.states()
        now[0] = EVERY
        assert (first, again, breakers.states()) == (parse_states(METRICS), first, None)

    def test_an_error_is_no_state(self) -> None:
        with MockProvider("no metrics", 0) as other:
            assert Breakers(other.url.rstrip("/")).states() is None

    def test_a_service_that_hangs_is_given_up_soon(self) -> None:
        with silent() as port, within(10):
            assert Breakers(f"http://127.0.0.1:{port}").states() is None


class _ServiceHandler(ProviderHandler):
    """Answers as the service does, and records each request."""

    def routes(self) -> Mapping[str, Methods]:
        metrics = {"GET": lambda: self.send_content(200, METRICS.encode(), "text/plain")}
        return {**super().routes(), "/metrics": metrics}

    def reply(self, status: int, body: Mapping[str, Any], **headers: str) -> None:
        given = {"X-Request-Id": self.headers.get("X-Request-Id", "")}
        super().reply(status, {**body, "path": self.path}, **headers, **given)


@pytest.fixture
def service() -> Iterator[MockProvider]:
    with MockProvider("service", 0) as running:
        running.RequestHandlerClass = _ServiceHandler
        yield running


@pytest.fixture
def sandbox(service: MockProvider) -> Iterator[Sandbox]:
    with Sandbox([("email 1", 0), ("email 2", 0)], service.url) as running:
        yield running


@pytest.fixture
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False  # ignore the environment's proxies
        yield session


Call = Callable[..., requests.Response]


@pytest.fixture
def call(sandbox: Sandbox, client: requests.Session) -> Call:
    """Call the page's server: method, path below /sandbox/, options of requests."""
    return lambda method, path, **options: client.request(
        method, f"{sandbox.url}sandbox/{path}", timeout=10, **options
    )


class TestState:
    def test_providers_are_listed_with_their_behaviour_breaker_and_counts(
        self, sandbox: Sandbox, client: requests.Session, call: Call
    ) -> None:
        first, second = sandbox.providers
        second.switch("503", 2)
        for provider in sandbox.providers:
            client.post(provider.url, json=TEXTS)

        state = call("GET", "state").json()

        assert state["service_answers"] is True
        assert state["providers"] == [
            {
                "name": "email 1",
                "port": first.port,
                "behaviour": "accept",
                "delay": 10.0,
                "breaker": "none",
                "accepted": 1,
                "received": 1,
            },
            {
                "name": "email 2",
                "port": second.port,
                "behaviour": "503",
                "delay": 2.0,
                "breaker": "none",
                "accepted": 0,
                "received": 1,
            },
        ]

    def test_breakers_are_unknown_while_the_service_is_away(
        self, service: MockProvider, call: Call
    ) -> None:
        service.stop()

        state = call("GET", "state").json()

        assert state["service_answers"] is False
        assert {provider["breaker"] for provider in state["providers"]} == {"unknown"}

    def test_a_heard_line_becomes_a_notification(self, sandbox: Sandbox, call: Call) -> None:
        before = call("GET", "state").json()
        sandbox.heard(entry())
        after = call("GET", "state").json()

        assert (before["reads_log"], before["notifications"]) == (False, [])
        assert after["reads_log"] is True
        assert ways(after["notifications"][0]) == ["Email: email 1: accepted"]

    @pytest.mark.parametrize(("level", "reads_log"), [("INFO", True), ("WARNING", False)])
    def test_a_log_without_info_lines_is_not_a_whole_log(
        self, sandbox: Sandbox, call: Call, level: str, reads_log: bool
    ) -> None:
        sandbox.heard(entry(level=level))

        assert call("GET", "state").json()["reads_log"] is reads_log


class TestSwitches:
    def test_the_page_switches_any_of_the_providers(self, sandbox: Sandbox, call: Call) -> None:
        second = sandbox.providers[1]

        reply = call("PUT", f"providers/{second.port}", json={"behaviour": "slow", "delay": 3})

        assert reply.status_code == 200
        assert (second.behaviour, second.state["delay"]) == ("slow", 3.0)
        assert sandbox.providers[0].behaviour == "accept"

    def test_a_wrong_value_gets_422(self, sandbox: Sandbox, call: Call) -> None:
        path = f"providers/{sandbox.providers[1].port}"

        assert call("PUT", path, json={"behaviour": "explode"}).status_code == 422
        assert call("PUT", "providers/1", json={"behaviour": "503"}).status_code == 404


class TestSending:
    def test_the_forms_request_reaches_the_service_and_its_answer_the_page(
        self, service: MockProvider, call: Call
    ) -> None:
        reply = call("POST", "notifications", json=SENT)

        (message,) = service.messages
        assert (message.to, message.title, message.message) == tuple(TEXTS.values())
        answer = reply.json()
        assert (reply.status_code, answer["status"], answer["reason"]) == (200, 200, "OK")
        assert json.loads(answer["body"])["path"] == "/api/v1.0/recipient/buyer/notify"
        assert answer["request_id"] == message.request_id
        (one,) = call("GET", "state").json()["notifications"]
        assert (one["title"], one["result"]) == ("Hello", "delivered")
        assert one["request_id"] == message.request_id

    def test_a_request_under_way_is_shown_before_its_answer(
        self, service: MockProvider, call: Call
    ) -> None:
        service.switch("slow", 60)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(call, "POST", "notifications", json=SENT)
            eventually(lambda: service.total)
            (one,) = call("GET", "state").json()["notifications"]
            service.switch("accept")
            waiting.result(timeout=10)

        assert one["result"] == "under way"

    def test_a_recipient_cannot_leave_its_place_in_the_path(
        self, call: Call, service: MockProvider
    ) -> None:
        answer = call("POST", "notifications", json={**SENT, "recipient": "../x?y"}).json()

        assert json.loads(answer["body"])["path"] == "/api/v1.0/recipient/..%2Fx%3Fy/notify"

    def test_a_recipient_that_no_url_can_have_gets_422(
        self, call: Call, service: MockProvider
    ) -> None:
        reply = call("POST", "notifications", json={**SENT, "recipient": "\ud800"})

        assert reply.status_code == 422
        assert reply.json() == {"error": "recipient has to be valid Unicode"}
        assert (service.total, call("GET", "state").json()["notifications"]) == (0, [])

    def test_without_a_service_the_page_learns_so_and_nothing_is_listed(self, client: Any) -> None:
        with (
            refusing() as port,
            Sandbox([("email 1", 0)], f"http://127.0.0.1:{port}") as sandbox,
        ):
            reply = client.post(f"{sandbox.url}sandbox/notifications", json=SENT, timeout=10)
            state = client.get(f"{sandbox.url}sandbox/state", timeout=10).json()

        assert reply.status_code == 502
        assert reply.json() == {"error": f"no answer from the service at http://127.0.0.1:{port}"}
        assert state["notifications"] == []


class TestClearing:
    def test_everything_is_forgotten(
        self, sandbox: Sandbox, client: requests.Session, call: Call
    ) -> None:
        call("POST", "notifications", json=SENT)
        client.post(sandbox.providers[1].url, json=TEXTS)
        sandbox.heard(entry())

        assert call("DELETE", "notifications").status_code == 200

        state = call("GET", "state").json()
        assert state["notifications"] == []
        assert [provider["received"] for provider in state["providers"]] == [0, 0]

    def test_a_cleared_notification_does_not_return(
        self, sandbox: Sandbox, service: MockProvider, call: Call
    ) -> None:
        service.switch("slow", 60)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(call, "POST", "notifications", json=SENT)
            eventually(lambda: service.total)
            call("DELETE", "notifications")
            service.switch("accept")
            waiting.result(timeout=10)
        sandbox.heard(entry())  # from long before

        assert call("GET", "state").json()["notifications"] == []

    def test_a_later_line_is_shown_again(self, sandbox: Sandbox, call: Call) -> None:
        call("DELETE", "notifications")
        sandbox.heard(entry(time.time() - NOON + 0.010))

        assert len(call("GET", "state").json()["notifications"]) == 1


class TestPage:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
    def test_the_other_ports_lead_to_the_page_by_the_same_host(
        self, sandbox: Sandbox, client: requests.Session, host: str
    ) -> None:
        first, second = sandbox.providers

        headers = {"Host": f"{host}:{second.port}"}
        reply = client.get(second.url, headers=headers, allow_redirects=False, timeout=5)

        assert reply.status_code == 303
        assert reply.headers["Location"] == f"http://{host}:{first.port}/"
        assert client.get(second.url, timeout=5).url == sandbox.url

    def test_messages_still_arrive_at_the_pages_address(
        self, sandbox: Sandbox, client: requests.Session
    ) -> None:
        for provider in sandbox.providers:
            assert client.post(provider.url, json=TEXTS, timeout=5).json() == {"message": "OK"}
            listed = client.get(f"{provider.url}messages", timeout=5).json()
            assert (listed["provider"], listed["total"]) == (provider.name, 1)

    def test_the_policy_allows_only_the_pages_own_files(
        self, sandbox: Sandbox, client: requests.Session
    ) -> None:
        for path, (_, kind) in FILES.items():
            reply = client.get(sandbox.url.rstrip("/") + path, timeout=5)
            policy = reply.headers["Content-Security-Policy"]
            assert (reply.status_code, reply.headers["Content-Type"]) == (200, kind)
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy

    def test_the_page_loads_nothing_from_elsewhere_and_writes_no_html(self) -> None:
        files = [(FOLDER / name).read_text(encoding="utf-8") for name, _ in FILES.values()]

        addresses = {found for text in files for found in re.findall(r"https?://[^/\s'\"]+", text)}
        assert addresses == {"http://www.w3.org"}  # the name space of the icon
        html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write"
        for text in files:
            assert not re.search(html, text)
            assert not re.search(r"<[^>]+\s(style|on\w+)=", text)  # the policy would block them

    def test_the_page_offers_every_behaviour(self) -> None:
        page = (FOLDER / "page.html").read_text(encoding="utf-8")

        template = page[page.index('<template id="provider">') :]
        assert re.findall('type="radio" value="([^"]+)"', template) == [*ANSWERS]

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", "notifications"), ("PUT", "providers/{port}")]
    )
    def test_a_cross_site_request_changes_nothing(
        self, sandbox: Sandbox, service: MockProvider, call: Call, method: str, path: str
    ) -> None:
        path = path.format(port=sandbox.providers[1].port)
        body = json.dumps({**SENT, "behaviour": "503"})

        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            reply = call(method, path, data=body, headers={"Content-Type": kind})
            assert reply.status_code == 415

        assert (service.total, sandbox.providers[1].behaviour) == (0, "accept")

    @pytest.mark.parametrize(
        ("method", "path"),
        [("GET", "state"), ("POST", "notifications"), ("DELETE", "notifications")],
    )
    def test_a_foreign_host_name_is_refused(
        self, service: MockProvider, call: Call, method: str, path: str
    ) -> None:
        reply = call(method, path, json=SENT, headers={"Host": "evil.example"})

        assert reply.status_code == 421
        assert service.total == 0

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "nothing", 404),
            ("POST", "nothing", 404),
            ("POST", "state", 405),
            ("GET", "notifications", 405),
            ("POST", "notifications", 400),
        ],
    )
    def test_other_requests_get_an_error_and_are_no_messages(
        self, sandbox: Sandbox, call: Call, method: str, path: str, status: int
    ) -> None:
        reply = call(method, path, data="[1]", headers={"Content-Type": "application/json"})

        assert reply.status_code == status
        assert "error" in reply.json()
        assert sandbox.providers[0].total == 0


def test_a_taken_port_names_its_provider_and_frees_the_others(service: MockProvider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    problem = f"email 2: cannot listen on 127.0.0.1:{service.port}: Address already in use"

    with pytest.raises(OSError, match=problem) as failure:
        Sandbox([("email 1", free), ("email 2", service.port)], service.url)

    assert failure.value.strerror == problem
    with MockProvider("email 1", free):
        pass


def run(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tools.dev.sandbox", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


class TestCommandLine:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.usefixtures("processes")
    def test_it_serves_the_page_and_every_provider_until_a_signal(
        self, client: requests.Session, service: MockProvider, number: signal.Signals
    ) -> None:
        with run(f"--service={service.url}", "email 1=0", "push = 2=0") as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            page, *urls = [line.split()[-1] for line in lines]
            client.post(urls[1], json=TEXTS, timeout=5)  # leaves a connection open
            state = client.get(f"{page}sandbox/state", timeout=5).json()

            process.send_signal(number)
            rest, errors = process.communicate(timeout=10)

        names = [provider["name"] for provider in state["providers"]]
        assert names == ["email 1", "push = 2"]
        assert [line.rsplit(": ", 1)[0] for line in lines] == ["sandbox", *names]
        assert page == urls[0]
        assert (state["service_answers"], len(state["notifications"])) == (True, 1)
        assert (process.returncode, rest, errors) == (0, "", "")

    @pytest.mark.usefixtures("processes")
    def test_a_taken_port_ends_it_with_one_line(self, service: MockProvider) -> None:
        with run("--service=http://x", "email 1=0", f"email 2={service.port}") as process:
            _, errors = process.communicate(timeout=10)

        assert process.returncode == 1
        expected = f"email 2: cannot listen on 127.0.0.1:{service.port}: Address already in use\n"
        assert errors == expected

    @pytest.mark.parametrize(
        "argument", ["email", "email=", "=9090", " =9090", "email=x", "email=65536", "email=-1"]
    )
    def test_a_malformed_argument_is_named_with_what_is_expected(
        self, argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["sandbox", "--service=http://x", argument])

        with pytest.raises(SystemExit, match="2"):
            main()

        assert f"{argument!r}: expected NAME=PORT" in capsys.readouterr().err
