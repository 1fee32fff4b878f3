"""The HTTP contract: which requests are refused and why, and the format that all errors share."""

import dataclasses
import io
import json
import logging
import random
import re
import time
from collections.abc import Callable
from contextvars import Context
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from notifier import __version__, logs
from notifier.app import build, create_app
from notifier.arrival import Arrival
from notifier.capacity import Capacity
from notifier.delivery import ChannelResult, ProviderResult, Report
from notifier.errors import AttemptOutcome
from notifier.models import Channel, ChannelOutcome, Message, Recipient
from notifier.settings import MIN_DEADLINE, Settings
from notifier.web.body import MAX_BODY_BYTES
from notifier.web.requests import Unlimited
from tests.addresses import INVALID, LOCAL, VALID
from tests.fixtures import Growth, MakeSettings

NOTIFY = "/api/v1.0/recipient/buyer/notify"
GOOD = {"to": "buyer@example.com", "title": "Your order", "message": "It is on its way"}
DELIVERED = {"message": "notification sent successfully"}

NO_UTF_8 = "body: must be UTF-8"
NO_JSON = "body: not valid JSON at line 1, column "
NO_OBJECT = "body: must be a JSON object"
EMPTY = "body: must not be empty, expected a JSON object"
BOM = "body: must not begin with a byte order mark"
TOO_DEEP = "body: nested too deeply"
NO_NUMBER = "body: contains a number that is too long or not allowed"

BLANK = "must not be empty or blank"
NO_STRING = "must be a string"
CONTROL = "must not contain control characters"
RequestLine = Callable[[], dict[str, Any]]
SURROGATES = "must not contain lone surrogates"

# The providers of a channel that fell back twice.
TRIED = (
    ProviderResult("email 1", AttemptOutcome.UNKNOWN, "503", 12),
    ProviderResult("email 2", AttemptOutcome.SKIPPED, "open"),
    ProviderResult("email 3", AttemptOutcome.ACCEPTED, None, 3),
)


class FakeDelivery:
    """Records what it is asked to deliver; `outcome` and `act` decide how a delivery ends."""

    def __init__(self) -> None:
        self.delivered: list[tuple[Recipient, Message]] = []
        self.deadlines: list[float] = []
        self.request_ids: list[str | None] = []
        self.act: Callable[[], None] = lambda: None
        self.outcome = "delivered"

    def deliver(self, recipient: Recipient, message: Message, deadline: float) -> Report:
        self.delivered.append((recipient, message))
        self.deadlines.append(deadline)
        self.request_ids.append(logs.request_id.get())
        self.act()
        return Report((ChannelResult(Channel.EMAIL, ChannelOutcome(self.outcome), TRIED),))

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture(scope="module")
def app() -> Flask:
    names = ("DB_HOST", "DB_NAME", "DB_USERNAME", "DB_PASSWORD")
    return create_app(Settings.from_env({"DB_PORT": "1", **dict.fromkeys(names, "none")}))


@pytest.fixture
def delivery(app: Flask, monkeypatch: pytest.MonkeyPatch) -> FakeDelivery:
    fake = FakeDelivery()
    notifier = dataclasses.replace(app.extensions["notifier"], delivery=fake)
    monkeypatch.setitem(app.extensions, "notifier", notifier)
    return fake


@pytest.fixture
def client(app: Flask, delivery: FakeDelivery) -> FlaskClient:
    del delivery  # requested so that no message is sent
    return app.test_client()


def error_of(response: TestResponse) -> tuple[int, str, str]:
    """Check that a reply has the errors' common format; return its status, code and message."""
    assert response.mimetype == "application/json"
    assert response.headers["X-Request-Id"]
    body = response.get_json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message"]
    code, message = body["error"]["code"], body["error"]["message"]
    assert re.fullmatch(r"E10[1-6]", code)
    assert message
    assert message.splitlines() == [message]
    return response.status_code, code, message


def refusal(client: FlaskClient, body: bytes | str) -> str:
    """Post a body that must be refused and return the error's message."""
    status, code, message = error_of(client.post(NOTIFY, data=body))
    assert (status, code) == (422, "E101")
    return message


def body(**changed: Any) -> str:
    return json.dumps(GOOD | changed)


@pytest.mark.parametrize("recipient", ["buyer", "seller"])
def test_a_good_request_is_delivered(
    recipient: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    response = client.post(f"/api/v1.0/recipient/{recipient}/notify", json=GOOD)
    assert (response.status_code, response.get_json()) == (200, DELIVERED)
    assert response.mimetype == "application/json"
    assert delivery.delivered == [(Recipient(recipient), Message(**GOOD))]


@pytest.mark.parametrize(
    "recipient",
    ["Buyer", "BUYER", "buyers", "buye", "buyer%20", "%20buyer", "admin", "%ff", "%00", "buyer%0A"],
)
def test_an_unknown_recipient_is_refused(
    recipient: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    response = client.post(f"/api/v1.0/recipient/{recipient}/notify", json=GOOD)
    assert error_of(response) == (422, "E101", "recipient: must be one of buyer, seller")
    assert delivery.delivered == []


@pytest.mark.parametrize("field", GOOD)
@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (None, "must not be null"),
        *[(value, BLANK) for value in ("", " ", " \t\r\n ", "\u00a0\u3000\u2028")],
        *[(value, NO_STRING) for value in (7, 1.5, 0, True, False)],
        *[(value, NO_STRING) for value in ([], {}, ["a@example.com"], {"a": "a@example.com"})],
        *[(value, SURROGATES) for value in ("a\ud800@example.com", "\udc00\ud800")],
    ],
    ids=ascii,
)
def test_the_error_names_the_invalid_field_and_the_reason(
    field: str, value: object, wrong: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    assert refusal(client, body(**{field: value})) == f"{field}: {wrong}"
    assert delivery.delivered == []


@pytest.mark.parametrize("field", GOOD)
def test_the_error_names_a_missing_field(field: str, client: FlaskClient) -> None:
    without = {name: value for name, value in GOOD.items() if name != field}
    assert refusal(client, json.dumps(without)) == f"{field}: is missing"


def test_the_error_lists_all_invalid_fields_in_the_order_of_the_contract(
    client: FlaskClient,
) -> None:
    assert refusal(client, "{}") == "to: is missing; title: is missing; message: is missing"
    wrong = '{"message": 1, "title": null, "to": "nobody", "other": 2}'
    assert refusal(client, wrong) == (
        "to: must be an email address; title: must not be null; message: must be a string"
    )


@pytest.mark.parametrize("field", ["to", "title"])
@pytest.mark.parametrize("character", ["\x00", "\t", "\n", "\r\n", "\x1b", "\x7f", "\x80", "\x9f"])
def test_control_characters_are_refused_in_fields_that_become_headers(
    field: str, character: str, client: FlaskClient
) -> None:
    for value in (f"a{character}@example.com", f"a@example.com{character}"):
        assert refusal(client, body(**{field: value})) == f"{field}: {CONTROL}"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)], ids=hex)
def test_of_the_control_characters_a_message_may_have_tab_line_feed_and_carriage_return(
    code: int, client: FlaskClient, delivery: FakeDelivery
) -> None:
    text = f"Dear buyer,{chr(code)}thank you"
    if chr(code) in "\t\n\r":
        assert client.post(NOTIFY, data=body(message=text)).status_code == 200
        assert delivery.delivered[0][1].message == text
    else:
        assert refusal(client, body(message=text)) == f"message: {CONTROL}"
        assert delivery.delivered == []


# Default-ignorable code points (fillers, joiners, marks, selectors, tags, unassigned ones), the
# blank Braille pattern, and the same beside white space.
INVISIBLE_TEXTS = [
    *["\u3164", "\uffa0", "\u115f\u1160", "\u200b", "\u200c\u200d", "\u00ad", "\u034f", "\ufeff"],
    *["\u200e\u200f", "\u061c", "\u2060", "\u2065", "\u2066\u2069", "\u206f", "\u17b4", "\u180b"],
    *["\u180e", "\ufe0f", "\ufff0", "\ufff9\ufffb", "\U000e0001", "\U000e0041\U000e007f"],
    *["\U000e01ef", "\U000e0fff", "\U0001d173", "\U0001bca0", "\u2800", " \u3164\u3000", "\u2800 "],
]


@pytest.mark.parametrize("field", ["title", "message"])
@pytest.mark.parametrize("text", INVISIBLE_TEXTS, ids=ascii)
def test_a_text_of_invisible_characters_only_is_refused_and_may_otherwise_have_them(
    field: str, text: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    wrong = f"{field}: must not consist of invisible characters only"
    assert refusal(client, body(**{field: text})) == wrong
    assert delivery.delivered == []
    assert client.post(NOTIFY, data=body(**{field: f"a{text}"})).status_code == 200
    assert getattr(delivery.delivered[0][1], field) == f"a{text}"


@pytest.mark.parametrize("character", "\u202a\u202b\u202c\u202d\u202e", ids=ascii)
def test_bidirectional_embeddings_and_overrides_are_refused_in_the_title_only(
    character: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    text = f"Your {character}order"
    wrong = "title: must not contain bidirectional embeddings or overrides"
    assert refusal(client, body(title=text)) == wrong
    assert client.post(NOTIFY, data=body(message=text)).status_code == 200
    assert delivery.delivered[0][1].message == text


def test_a_title_may_have_direction_marks_and_isolates(
    client: FlaskClient, delivery: FakeDelivery
) -> None:
    title = "\u200fYour \u2068\u05d0\u05d1\u2069 \u2066a\u2069 \u2067b\u2069 order\u200e\u061c"
    assert client.post(NOTIFY, data=body(title=title)).status_code == 200
    assert delivery.delivered[0][1].title == title


@pytest.mark.parametrize(
    "coding", ["gzip", "br", "x-gzip", "identity, gzip", "gzip, identity", "identityx", "\u00fc"]
)
def test_a_content_encoding_is_refused(
    coding: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    response = client.post(NOTIFY, data=body(), headers={"Content-Encoding": coding})
    wrong = "Content-Encoding: must be absent or identity"
    assert error_of(response) == (422, "E101", wrong)
    assert delivery.delivered == []


@pytest.mark.parametrize("coding", ["identity", "Identity", " IDENTITY ", "", "identity, identity"])
def test_the_content_encoding_may_be_identity(coding: str, client: FlaskClient) -> None:
    response = client.post(NOTIFY, data=body(), headers={"Content-Encoding": coding})
    assert response.get_json() == DELIVERED


@pytest.mark.parametrize(
    ("field", "longest", "text"),
    [
        *[("title", 255, letter * 255) for letter in ("a", "\u00fc", "\U0001f600")],
        *[("message", 10_000, letter * 10_000) for letter in ("a", "\u00fc", "\U0001f600")],
    ],
    ids=lambda value: ascii(value)[:9],
)
def test_a_field_may_be_as_long_as_its_limit_but_no_longer(
    field: str, longest: int, text: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    escaped = body(**{field: text})
    for fits in (escaped, json.dumps(json.loads(escaped), ensure_ascii=False)):
        assert client.post(NOTIFY, data=fits).get_json() == DELIVERED
    assert [getattr(message, field) for _, message in delivery.delivered] == [text, text]
    too_long = body(**{field: text[0] + text})
    assert refusal(client, too_long) == f"{field}: must be at most {longest} characters"


@pytest.mark.parametrize("to", VALID, ids=ascii)
def test_a_valid_email_address_is_passed_on_unchanged(
    to: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    assert client.post(NOTIFY, data=body(to=to)).get_json() == DELIVERED
    assert delivery.delivered[0][1].to == to


@pytest.mark.parametrize("to", [*INVALID, *LOCAL], ids=ascii)
def test_an_invalid_email_address_is_refused_and_not_echoed(
    to: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    assert refusal(client, body(to=to)) == "to: must be an email address"
    assert delivery.delivered == []


@pytest.mark.parametrize("switch", ["on", "off"])
def test_local_addresses_need_their_setting(switch: str, make_settings: MakeSettings) -> None:
    app = create_app(make_settings(allow_local_addresses=switch))
    notifier = app.extensions["notifier"]
    app.extensions["notifier"] = dataclasses.replace(notifier, delivery=FakeDelivery())
    statuses = {app.test_client().post(NOTIFY, data=body(to=to)).status_code for to in LOCAL}
    assert statuses == {200 if switch == "on" else 422}
    notifier.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        *[(data, EMPTY) for data in (b"", b" \r\n\t")],
        *[(data, NO_OBJECT) for data in (b"null", b"true", b"7", b'"to"', b"[]", b"[{}]")],
        (b"{", NO_JSON + "2"),
        (b"{'to': 1}", NO_JSON + "2"),
        (b'{"to": "a@example.com",}', NO_JSON),
        (b"{} {}", NO_JSON + "4"),
        (b"to=a%40example.com&title=t&message=m", NO_JSON + "1"),
        *[(b'{"to": %s}' % wrong, NO_JSON) for wrong in (b'"a\nb"', b'"\\x41"', b'"\\ud8"', b"01")],
        (body().encode()[:-1], NO_JSON),
        *[(b'{"to": "%s"}' % raw, NO_UTF_8) for raw in (b"\xff", b"\xed\xa0\x80", b"\xc0\xaf")],
        (body().encode("latin-1").replace(b"Your", b"\xfcber"), NO_UTF_8),
        *[(body().encode(encoding), NO_UTF_8) for encoding in ("utf-16", "utf-32")],
        (body().encode("utf-16-le"), NO_JSON),
        *[(data.encode("utf-8-sig"), BOM) for data in (body(), "", f" {body()}", "{")],
        (b"\x1f\x8b\x08\x00" + body().encode(), NO_UTF_8),
        (b"\x00" + body().encode(), NO_JSON),
        (b"[" * 200_000, TOO_DEEP),
        (b"[" * 100_000 + b"]" * 100_000, TOO_DEEP),
        (b'{"a":' * 40_000 + b"1" + b"}" * 40_000, TOO_DEEP),
        (b'{"to": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", TOO_DEEP),
        (b'{"to": ' + b"9" * 5_000 + b"}", NO_NUMBER),
        (b'{"other": -' + b"9" * 200_000 + b"}", NO_NUMBER),
        *[(b'{"to": %s}' % name, NO_NUMBER) for name in (b"NaN", b"Infinity", b"-Infinity")],
        *[(b'{"to": %s}' % float_, f"to: {NO_STRING}; ") for float_ in (b"1e999", b"-0.0")],
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_a_body_that_is_not_a_json_object_is_refused(
    data: bytes, why: str, client: FlaskClient
) -> None:
    message = refusal(client, data)
    assert message.startswith(why)
    assert message == why or why.endswith((" ", "; "))


@pytest.mark.parametrize(
    ("data", "title"),
    [
        (body(other=1, priority={"deep": [None, 1.5]}, **{"": 0}), GOOD["title"]),
        (body(Title="another", TO="x"), GOOD["title"]),
        (body(other="\ud800"), GOOD["title"]),
        (f" \r\n\t{body()}\n", GOOD["title"]),
        (body()[:-1] + ', "title": "the last"}', "the last"),
        ('{"title": 7, ' + body()[1:], GOOD["title"]),
        (body(title="  padded  "), "  padded  "),
        (body(title="\U0001f600"), "\U0001f600"),
        (body(title="a").replace('"a"', r'"\ud83d\ude00 \u0041\/"'), "\U0001f600 A/"),
        (body()[:-1] + ', "other": ' + "[" * 100 + "]" * 100 + "}", GOOD["title"]),
        (body()[:-1] + ', "other": ' + "9" * 4_000 + "}", GOOD["title"]),
    ],
    ids=range(11),
)
def test_input_that_the_contract_does_not_forbid_is_accepted(
    data: str, title: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    assert client.post(NOTIFY, data=data).get_json() == DELIVERED
    assert delivery.delivered == [(Recipient.BUYER, Message(**(GOOD | {"title": title})))]


@pytest.mark.parametrize(
    "content_type",
    [
        *["application/json", "application/json; charset=utf-16", "text/plain", "text/html", ""],
        *["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "\u00fc", None],
    ],
)
def test_the_body_is_read_as_json_whatever_its_content_type(
    content_type: str | None, client: FlaskClient
) -> None:
    response = client.post(NOTIFY, data=body(), content_type=content_type)
    assert response.get_json() == DELIVERED


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_256_kib_is_accepted_and_a_larger_one_refused(
    announced: bool, client: FlaskClient
) -> None:
    assert MAX_BODY_BYTES == 262_144
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413), (10**6, 413)):
        data = body().encode().ljust(size)
        chunked = {"wsgi.input": io.BytesIO(data), "wsgi.input_terminated": True}
        response = client.post(
            NOTIFY, data=data if announced else None, environ_overrides={} if announced else chunked
        )
        assert response.status_code == status
    assert error_of(response) == (413, "E105", "body too large")


@pytest.mark.parametrize("terminated", [True, False])
def test_a_body_that_ends_early_is_refused(terminated: bool, client: FlaskClient) -> None:
    short: dict[str, Any] = {"wsgi.input": io.BytesIO(body().encode()), "CONTENT_LENGTH": "1000"}
    if terminated:  # gunicorn sets this for every body
        short["wsgi.input_terminated"] = True
    status, code, message = error_of(client.post(NOTIFY, environ_overrides=short))
    assert (status, code) == (422, "E101")
    assert message.startswith("body: ends ")


@pytest.mark.parametrize(
    "path",
    [
        *["/nothing", "/api/v1.0/recipient/buyer", "/api/v1.0/recipient/buyer/notify/more"],
        *[f"{NOTIFY}/", "/healthz/", "/Healthz", NOTIFY.upper(), "/api/v1/recipient/buyer/notify"],
        *[
            "/api//v1.0/recipient/buyer/notify",
            "/api/v1.0/recipient//notify",
            "/api/v1.0/recipient/a%2Fb/notify",
            "/static/x",
            "*",
        ],
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_an_unknown_path_is_404(
    path: str, method: str, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="notifier")
    response = client.open(path, method=method, data=body())
    assert error_of(response) == (404, "E103", "no such path")
    (record,) = [record for record in caplog.records if record.name == "notifier.web.requests"]
    assert record.__dict__["route"] == "unmatched"


def paths_and_methods(app: Flask) -> list[tuple[str, set[str]]]:
    return [
        (re.sub(r"<[^>]+>", "buyer", rule.rule), set(rule.methods or ()))
        for rule in app.url_map.iter_rules()
    ]


def test_every_route_answers_other_methods_with_405_and_lists_the_allowed_ones(
    app: Flask, client: FlaskClient
) -> None:
    for path, methods in paths_and_methods(app):
        assert "OPTIONS" not in methods
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"} - methods:
            response = client.open(path, method=method, data=body())
            assert error_of(response) == (405, "E104", "method not allowed")
            assert response.headers["Allow"] == ", ".join(sorted(methods))


def test_on_every_route_an_unexpected_error_is_500_and_reveals_nothing(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("SELECT secret_key FROM db.internal.example.com")

    for name in app.view_functions:
        monkeypatch.setitem(app.view_functions, name, fail)
    for path, methods in paths_and_methods(app):
        for method in methods - {"HEAD"}:
            response = client.open(path, method=method, data=body())
            assert error_of(response) == (500, "E102", "internal server error")
            assert "internal.example" not in f"{response.headers}{response.text}"


@pytest.mark.parametrize("outcome", ["failed", "no_provider"])
def test_a_failed_delivery_is_answered_with_500(
    outcome: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    delivery.outcome = outcome
    response = client.post(NOTIFY, json=GOOD)
    assert error_of(response) == (500, "E102", "internal server error")


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyError("to"), OSError(5)])
def test_an_exception_during_delivery_is_not_shown_to_the_caller(
    error: Exception, client: FlaskClient, delivery: FakeDelivery
) -> None:
    def fail() -> None:
        raise error

    delivery.act = fail
    response = client.post(NOTIFY, json=GOOD)
    assert error_of(response) == (500, "E102", "internal server error")


def test_a_valid_request_without_a_place_is_refused(
    app: Flask, client: FlaskClient, delivery: FakeDelivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = Capacity(1, 0.0)
    notifier = dataclasses.replace(app.extensions["notifier"], capacity=capacity)
    monkeypatch.setitem(app.extensions, "notifier", notifier)
    capacity.take(Arrival.now())
    delivery.act = lambda: pytest.fail("delivered without a place")
    response = client.post(NOTIFY, json=GOOD)
    assert error_of(response) == (503, "E106", "too many requests, try again later")
    assert response.headers["Retry-After"] == "1"
    assert refusal(client, b"{").startswith(NO_JSON)
    capacity.give()

    for act in (lambda: None, lambda: 1 / 0, lambda: None):  # a failure releases the place
        delivery.act = act
        assert client.post(NOTIFY, json=GOOD).status_code in (200, 500)


def turn_of(arrival: Arrival) -> Unlimited:
    turn = Unlimited()
    turn.arrival = arrival
    return turn


def test_the_deadline_counts_from_the_arrival_of_the_request(
    app: Flask, client: FlaskClient, delivery: FakeDelivery
) -> None:
    arrival = Arrival(time.monotonic() - 3.0, 0.0)
    client.post(NOTIFY, json=GOOD, environ_overrides={"notifier.turn": turn_of(arrival)})
    deadline = app.extensions["notifier"].settings.notify_deadline
    assert delivery.deadlines == [arrival.time + deadline]


def test_a_request_that_waited_for_a_place_has_time_left_for_an_attempt(
    make_settings: MakeSettings,
) -> None:
    for deadline, patience in ((15.0, 1.0), (1.0, 0.7), (MIN_DEADLINE, 0.0)):
        settings = make_settings(notify_deadline=deadline, http_client_timeout=0.1)
        notifier = build(settings)
        assert notifier.capacity._patience == pytest.approx(patience)
        notifier.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_liveness_endpoint_answers(method: str, client: FlaskClient) -> None:
    response = client.open("/healthz", method=method)
    assert response.status_code == 200
    assert response.headers["X-Request-Id"]
    expected = {"message": "server is running"}
    assert response.text == "" if method == "HEAD" else response.get_json() == expected


def test_the_root_says_what_the_service_is_and_names_each_route(
    app: Flask, client: FlaskClient
) -> None:
    reply = client.get("/")
    assert client.get(environ_overrides={"PATH_INFO": ""}).data == reply.data
    assert (reply.status_code, reply.mimetype) == (200, "application/json")
    overview = reply.get_json()
    assert (overview["service"], overview["version"]) == ("notifier", __version__)
    routes = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert overview["endpoints"].keys() == routes - {"GET /"}
    assert "docs/api.md" in overview["documents"]
    head = client.head("/")
    assert (head.status_code, head.text) == (200, "")
    assert head.headers["Content-Length"] == str(len(reply.data))


@pytest.mark.parametrize("given", ["req-1", "a", "x" * 128, "~!{} =", "0" * 32])
def test_a_valid_request_id_is_kept(
    given: str, client: FlaskClient, delivery: FakeDelivery
) -> None:
    for path in (NOTIFY, "/nothing", "/healthz"):
        response = client.post(path, json=GOOD, headers={"X-Request-Id": given})
        assert response.headers.getlist("X-Request-Id") == [given]
    assert delivery.request_ids == [given]


@pytest.mark.parametrize(
    "given", [None, "", "x" * 129, "\u00fc", "a\tb", "a\x7f", "a\x80"], ids=ascii
)
def test_any_other_request_id_is_replaced_by_a_new_one(
    given: str | None, client: FlaskClient, delivery: FakeDelivery
) -> None:
    headers = {} if given is None else {"X-Request-Id": given}
    replies = [client.post(NOTIFY, json=GOOD, headers=headers) for _ in range(2)]
    made = [reply.headers["X-Request-Id"] for reply in replies]
    assert made == delivery.request_ids
    assert len(set(made)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", request_id) for request_id in made)


def test_a_thread_forgets_the_request_id_after_the_request(client: FlaskClient) -> None:
    client.get("/healthz", headers={"X-Request-Id": "order 4711"})
    assert logs.request_id.get() is None


@pytest.mark.parametrize("method", ["CONNECT", "DELETE", "HEAD", "PATCH", "PUT", "TRACE", "GRAB"])
def test_a_request_is_counted_by_its_method_and_an_unknown_method_as_other(
    method: str, client: FlaskClient, growth: Growth
) -> None:
    client.open(NOTIFY, method=method)
    label = "_OTHER" if method == "GRAB" else method
    assert growth("http_server_requests_total") == {(label, "unmatched", "405"): 1}


@pytest.mark.parametrize("error", [None, RuntimeError("no")])
def test_a_request_counts_as_active_until_it_ends_even_with_an_error(
    error: Exception | None, client: FlaskClient, delivery: FakeDelivery, growth: Growth
) -> None:
    seen = []

    def act() -> None:
        seen.append(growth("http_server_active_requests"))
        for path in ("/no/such/path", "/healthz"):  # other requests that end sooner
            Context().run(client.get, path)
        seen.append(growth("http_server_active_requests"))
        if error:
            raise error

    delivery.act = act
    client.post(NOTIFY, json=GOOD)
    assert seen == [{(): 1}, {(): 1}]
    assert growth("http_server_active_requests") == {}


@pytest.fixture
def request_line(caplog: pytest.LogCaptureFixture) -> RequestLine:
    """Return the fields of the log record of the test's only request."""
    caplog.set_level(logging.DEBUG, logger="notifier")

    def line() -> dict[str, Any]:
        (record,) = [record for record in caplog.records if record.name == "notifier.web.requests"]
        assert record.getMessage() == "request"
        return record.__dict__

    return line


@pytest.mark.parametrize(
    ("path", "level", "route"),
    [
        (f"{NOTIFY}?to=a@example.com", "INFO", "/api/v1.0/recipient/<recipient>/notify"),
        ("/", "DEBUG", "/"),
        ("/healthz", "DEBUG", "/healthz"),
        ("/metrics", "DEBUG", "/metrics"),
    ],
)
def test_a_request_has_one_log_line_that_names_the_route_and_not_the_path(
    path: str, level: str, route: str, client: FlaskClient, request_line: RequestLine
) -> None:
    method = "POST" if path.startswith(NOTIFY) else "GET"
    client.open(path, method=method, data=body())
    line = request_line()
    fields = {name: line[name] for name in ("levelname", "method", "route", "status")}
    assert fields == {"levelname": level, "method": method, "route": route, "status": 200}
    assert line["duration_ms"] >= 0
    assert "a@example.com" not in repr(line)


def test_the_log_line_has_the_duration_in_milliseconds(
    client: FlaskClient, request_line: RequestLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("notifier.web.requests.time", SimpleNamespace(monotonic=lambda: 100.25))
    client.get("/healthz", environ_overrides={"notifier.turn": turn_of(Arrival(100.0, 100.0))})
    assert request_line()["duration_ms"] == 250


def test_the_log_line_of_a_notification_names_recipient_channels_and_providers(
    client: FlaskClient, request_line: RequestLine
) -> None:
    client.post(NOTIFY, json=GOOD)
    line = request_line()
    assert (line["recipient"], line["to"]) == ("buyer", "b***@example.com")
    assert json.loads(json.dumps(line["channels"])) == [
        {
            "channel": "Email",
            "outcome": "delivered",
            "provider": "email 3",
            "attempts": 2,
            "skipped": 1,
            "providers": [
                {"provider": "email 1", "outcome": "unknown", "reason": "503", "ms": 12},
                {"provider": "email 2", "outcome": "skipped", "reason": "open"},
                {"provider": "email 3", "outcome": "accepted", "ms": 3},
            ],
        }
    ]


def test_the_line_of_a_failed_channel_names_no_provider_that_accepted(
    client: FlaskClient, delivery: FakeDelivery, request_line: RequestLine
) -> None:
    delivery.outcome = "failed"
    client.post(NOTIFY, json=GOOD)
    (email,) = request_line()["channels"]
    assert (email["outcome"], email["provider"]) == ("failed", None)


def test_the_line_of_a_refused_request_has_its_code_and_the_reason(
    client: FlaskClient, request_line: RequestLine
) -> None:
    client.post(NOTIFY, json=GOOD | {"to": "nobody@"})
    line = request_line()
    assert (line["status"], line["code"]) == (422, "E101")
    assert line["reason"] == "to: must be an email address"
    assert "nobody" not in repr(line)


@pytest.mark.parametrize(("places", "reason"), [(0, "the queue is full"), (1, "no place in time")])
def test_the_line_of_a_request_without_a_place_says_why(
    places: int, reason: str, client: FlaskClient, app: Flask, request_line: RequestLine
) -> None:
    app.extensions["notifier"].capacity = capacity = Capacity(places, 0.0)
    if places:
        capacity.take(Arrival.now())
    client.post(NOTIFY, json=GOOD)
    line = request_line()
    assert (line["status"], line["code"], line["reason"]) == (503, "E106", reason)
    assert line["levelname"] == "WARNING"


@pytest.mark.parametrize("path", ["/nothing", "/healthz"])
def test_the_line_of_a_request_that_nobody_serves_has_its_code(
    path: str, client: FlaskClient, request_line: RequestLine
) -> None:
    status = client.post(path).status_code
    assert request_line()["code"] == {404: "E103", 405: "E104"}[status]


@pytest.mark.parametrize(
    "case",
    [(GOOD, "delivered", "INFO"), (GOOD, "failed", "ERROR"), ({}, "delivered", "INFO")],
)
def test_only_a_failed_delivery_is_logged_as_an_error(
    case: tuple[dict[str, str], str, str],
    client: FlaskClient,
    delivery: FakeDelivery,
    request_line: RequestLine,
) -> None:
    sent, delivery.outcome, level = case
    client.post(NOTIFY, json=sent)
    assert (request_line()["levelname"], request_line()["recipient"]) == (level, "buyer")


PIECES = [
    *[b'"to"', b'"title"', b'"message"', b'"a@example.com"', b'"t"', b":", b",", b"{", b"}", b"["],
    *[
        b"]",
        b"null",
        b"true",
        b"-1.5e3",
        b"1e999",
        b"NaN",
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b"\\",
    ],
    *[
        b'"',
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\n",
        b" ",
        b"\\u0000",
        b"9" * 5000,
    ],
]


def mangled(chance: random.Random) -> bytes:
    """Return a valid body with some of its bytes deleted, doubled or replaced."""
    data = bytearray(body(other=[1, None]).encode())
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data))
        until = at + chance.choice([0, 1, 1, 2, 20])
        data[at:until] = chance.choice([b"", data[at:until] * 2, *PIECES])
        data = data or bytearray(b"{")
    return bytes(data)


def test_no_malformed_body_causes_a_500(client: FlaskClient, delivery: FakeDelivery) -> None:
    chance = random.Random(1_000_003)
    bodies = [mangled(chance) for _ in range(400)]
    bodies += [b"".join(chance.choices(PIECES, k=chance.randint(1, 30))) for _ in range(200)]
    accepted = 0
    for data in bodies:
        response = client.post(NOTIFY, data=data)
        if response.status_code == 200:
            accepted += 1
        else:
            status, code, _ = error_of(response)
            assert (status, code) == (422, "E101"), data
    assert accepted == len(delivery.delivered) < len(bodies)
