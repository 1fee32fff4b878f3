"""The mock provider, over real sockets: its answers, its messages and its switch."""

import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

from tests.timing import eventually
from tools.dev.json_handler import MAX_BODY_BYTES
from tools.dev.mock_provider import MAX_MESSAGES, MockProvider

NOTIFICATION = {
    "to": "buyer@example.com",
    "title": "Hello",
    "message": "Your order is on its way.",
    "secret_key": "sk-live-123456",
}
HOST = "127.0.0.1"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # for SO_LINGER


@pytest.fixture
def provider() -> Iterator[MockProvider]:
    with MockProvider("email 1", 0) as running:
        yield running


@pytest.fixture
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False  # ignore the environment's proxies
        yield session


@pytest.fixture
def post(provider: MockProvider, client: requests.Session) -> Callable[..., requests.Response]:
    """Send a notification to the provider; keyword arguments replace its fields."""

    def send(**fields: Any) -> requests.Response:
        return client.post(provider.url, json={**NOTIFICATION, **fields}, timeout=5)

    return send


@pytest.fixture
def put(provider: MockProvider, client: requests.Session) -> Callable[[Any], requests.Response]:
    """Ask the provider over HTTP for another behaviour."""
    return lambda body: client.put(f"{provider.url}behaviour", json=body, timeout=5)


def exchange(provider: MockProvider, request: bytes) -> bytes:
    """Send these bytes and return all that comes back until the provider closes."""
    with socket.create_connection((HOST, provider.port), timeout=5) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def raw_notification() -> bytes:
    body = json.dumps(NOTIFICATION).encode()
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class TestBehaviours:
    def test_an_accepting_provider_answers_200_with_json(self, post: Any) -> None:
        reply = post()

        assert (reply.status_code, reply.json()) == (200, {"message": "OK"})

    @pytest.mark.parametrize(("status", "retry_after"), [(503, None), (429, "1")])
    def test_a_refusing_provider_answers_its_status_and_records_the_message(
        self, provider: MockProvider, post: Any, status: int, retry_after: str | None
    ) -> None:
        provider.switch(str(status))

        reply = post()

        assert (reply.status_code, reply.json()) == (status, {"message": reply.reason})
        assert reply.headers.get("Retry-After") == retry_after
        assert [message.answer for message in provider.messages] == [f"{status} {reply.reason}"]

    def test_a_dropped_connection_is_reset_without_an_answer(self, provider: MockProvider) -> None:
        provider.switch("drop")

        with pytest.raises(ConnectionResetError):
            exchange(provider, raw_notification())

        assert [message.answer for message in provider.messages] == [
            "no answer: connection dropped"
        ]

    def test_a_connection_is_dropped_even_after_an_answered_request(
        self, provider: MockProvider, post: Any
    ) -> None:
        post()
        provider.switch("drop")

        with pytest.raises(requests.ConnectionError):
            post()

        assert provider.total == 2

    def test_a_slow_provider_answers_200_after_its_delay(
        self, provider: MockProvider, post: Any
    ) -> None:
        provider.switch("slow", 0.2)
        began = time.monotonic()

        reply = post()

        assert reply.status_code == 200
        assert time.monotonic() - began >= 0.2
        assert re.fullmatch(r"200 OK after \d+\.\d s", provider.messages[0].answer)

    def test_a_slow_answer_is_shown_as_waiting_and_comes_once_the_behaviour_changes(
        self, provider: MockProvider, post: Any
    ) -> None:
        provider.switch("slow", 60)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(post)
            eventually(lambda: provider.total == 1)
            assert provider.messages[0].answer == "waiting to answer 200 OK"

            provider.switch("503")

            assert waiting.result(timeout=5).status_code == 200
        assert provider.messages[0].answer.startswith("200 OK after")

    def test_a_slow_answer_leaves_the_order_of_messages_as_it_was(
        self, provider: MockProvider, post: Any
    ) -> None:
        provider.switch("slow", 60)
        with ThreadPoolExecutor() as pool:
            for number in (1, 2):
                pool.submit(post, title=str(number))
                eventually(lambda: provider.total == number)  # noqa: B023 - called in the same round
            provider.switch("accept")

        assert [message.title for message in provider.messages] == ["2", "1"]

    @pytest.mark.parametrize("reset", [False, True])
    def test_a_client_that_leaves_a_slow_provider_is_recorded_as_not_answered(
        self, provider: MockProvider, reset: bool
    ) -> None:
        provider.switch("slow", 60)
        with socket.create_connection((HOST, provider.port), timeout=5) as connection:
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.sendall(raw_notification())
            eventually(lambda: provider.total == 1)

        provider.switch("accept")

        eventually(lambda: "waiting" not in provider.messages[0].answer)
        assert provider.messages[0].answer.startswith("no answer: the client had left after")

    def test_an_unknown_behaviour_is_refused_in_python_too(self, provider: MockProvider) -> None:
        with pytest.raises(ValueError, match="behaviour is 'broken'; expected one of accept, 503"):
            provider.switch("broken")

        assert provider.behaviour == "accept"


class TestMessages:
    def test_a_message_is_listed_with_all_that_the_page_shows(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        client.post(f"{provider.url}any/path", json=NOTIFICATION, headers={"X-Request-Id": "r-1"})

        body = client.get(f"{provider.url}messages").json()

        received_at = datetime.fromisoformat(body["messages"][0].pop("received_at"))
        assert received_at.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - received_at) < timedelta(seconds=5)
        expected = {**NOTIFICATION, "secret_key": "sk***", "request_id": "r-1", "answer": "200 OK"}
        assert body == {"provider": "email 1", "total": 1, "messages": [expected]}

    def test_messages_are_listed_newest_first_and_only_the_last_are_kept(
        self, provider: MockProvider, post: Any, client: requests.Session
    ) -> None:
        for number in range(MAX_MESSAGES + 3):
            post(title=str(number))

        body = client.get(f"{provider.url}messages").json()

        titles = [message["title"] for message in body["messages"]]
        assert titles == [str(number) for number in range(MAX_MESSAGES + 2, 2, -1)]
        assert body["total"] == MAX_MESSAGES + 3

    @pytest.mark.parametrize(
        ("secret", "masked"),
        [
            ("sk-live-123456", "sk***"),
            ("1234567", "12***"),
            ("123456", "***"),
            ("§", "***"),
            ("", ""),
            (None, ""),
        ],
    )
    def test_a_secret_is_masked_as_it_arrives(
        self, provider: MockProvider, post: Any, secret: str | None, masked: str
    ) -> None:
        post(secret_key=secret)

        assert provider.messages[0].secret_key == masked
        assert not secret or secret not in repr(vars(provider))

    def test_missing_fields_are_empty_and_other_values_are_shown_as_text(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        client.post(provider.url, json={"to": 7, "message": {"a": ["b"]}})

        message = provider.messages[0]
        assert (message.to, message.title, message.message) == ("7", "", "{'a': ['b']}")

    def test_text_of_any_kind_comes_back_as_it_was_sent(
        self, provider: MockProvider, post: Any, client: requests.Session
    ) -> None:
        texts = ["<script>alert(1)</script>", "héllo 👋 \u202e", "\ud800", "\0\n\t"]
        for text in texts:
            post(message=text)

        body = client.get(f"{provider.url}messages").json()

        assert [message["message"] for message in reversed(body["messages"])] == texts

    def test_messages_that_arrive_at_once_are_all_counted(self, provider: MockProvider) -> None:
        def send(_: int) -> int:
            return requests.post(provider.url, json=NOTIFICATION, timeout=5).status_code

        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(send, range(96)))

        assert statuses == [200] * 96
        assert (provider.total, len(provider.messages)) == (96, 96)


class TestRefusedRequests:
    @pytest.mark.parametrize(
        "body",
        [b"", b"not json", b"[1]", b"null", b'"text"', b"\xff\xfe", b'{"to":', b"[" * 200_000],
    )
    def test_a_body_that_is_no_json_object_gets_400(
        self, provider: MockProvider, client: requests.Session, body: bytes
    ) -> None:
        reply = client.post(provider.url, data=body)

        assert reply.status_code == 400
        assert reply.json() == {"error": "the body has to be a JSON object"}
        assert provider.messages == ()

    def test_a_body_at_the_limit_is_taken_and_one_over_it_gets_413(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        body = json.dumps({"message": ""}).encode().ljust(MAX_BODY_BYTES)

        assert client.post(provider.url, data=body).status_code == 200
        reply = client.post(provider.url, data=body + b" ")

        assert reply.status_code == 413
        assert reply.json() == {"error": "the body has to be at most 1048576 bytes long"}
        assert provider.total == 1

    @pytest.mark.parametrize(
        "header", ["Transfer-Encoding: chunked", "Content-Length: -1", "Content-Length: 1_0"]
    )
    def test_a_body_of_no_stated_length_gets_411_and_a_closed_connection(
        self, provider: MockProvider, header: str
    ) -> None:
        reply = exchange(provider, f"POST / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())

        assert reply.startswith(b"HTTP/1.1 411 ")
        assert b"Content-Length has to give" in reply

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("PUT", "messages", "GET, HEAD, DELETE, POST"),
            ("DELETE", "behaviour", "GET, HEAD, PUT, POST"),
            ("PATCH", "behaviour", "GET, HEAD, PUT, POST"),
            ("OPTIONS", "behaviour", "GET, HEAD, PUT, POST"),
            ("STRANGE", "", "POST"),
        ],
    )
    def test_another_method_gets_405_and_what_is_allowed(
        self,
        provider: MockProvider,
        client: requests.Session,
        method: str,
        path: str,
        allow: str,
    ) -> None:
        reply = client.request(method, provider.url + path, data=b"unread", timeout=5)

        assert (reply.status_code, reply.headers["Allow"]) == (405, allow)
        assert reply.json() == {"error": "no such method here"}
        assert client.get(f"{provider.url}messages").status_code == 200

    def test_an_unknown_path_gets_404(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        reply = client.get(f"{provider.url}favicon.ico")

        assert reply.status_code == 404
        assert reply.json()["error"].startswith("no such path")

    def test_malformed_http_gets_an_error_in_json(self, provider: MockProvider) -> None:
        reply = exchange(provider, b"GET / HTTP/9.9\r\n\r\n")

        assert b'{"error": ' in reply


class TestBehaviourOverHttp:
    def test_the_current_behaviour_and_the_choices_are_returned(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        assert client.get(f"{provider.url}behaviour").json() == {
            "behaviour": "accept",
            "delay": 10.0,
            "choices": ["accept", "503", "429", "slow", "drop"],
        }

    def test_a_change_is_answered_with_the_new_state(
        self, provider: MockProvider, put: Any, post: Any
    ) -> None:
        reply = put({"behaviour": "503"})

        assert reply.status_code == 200
        assert (reply.json()["behaviour"], reply.json()["delay"]) == ("503", 10.0)
        assert provider.behaviour == "503"
        assert post().status_code == 503

    @pytest.mark.parametrize("delay", [0, 2.5, 60])
    def test_a_delay_can_be_set_and_is_kept(
        self, provider: MockProvider, put: Any, delay: float
    ) -> None:
        assert put({"behaviour": "slow", "delay": delay}).json()["delay"] == delay
        assert put({"behaviour": "accept"}).json()["delay"] == delay

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            ({}, "behaviour is ''; expected one of accept, 503, 429, slow, drop"),
            ({"behaviour": 503}, "behaviour is 503; expected one of accept, 503, 429, slow, drop"),
            ({"behaviour": ["x"]}, "behaviour is ['x']; expected one of"),
            ({"behaviour": "x" * 999}, "behaviour is 'xxx"),
            ({"behaviour": "slow", "delay": -0.1}, "delay is -0.1; expected 0 to 60 seconds"),
            ({"behaviour": "slow", "delay": 60.1}, "delay is 60.1; expected 0 to 60 seconds"),
            ({"behaviour": "slow", "delay": "5"}, "delay is '5'; expected 0 to 60 seconds"),
            ({"behaviour": "slow", "delay": True}, "delay is True; expected 0 to 60 seconds"),
            ({"behaviour": "slow", "delay": [1]}, "delay is [1]; expected 0 to 60 seconds"),
        ],
    )
    def test_a_wrong_value_gets_422_and_changes_nothing(
        self, provider: MockProvider, put: Any, body: dict[str, Any], error: str
    ) -> None:
        reply = put(body)

        assert reply.status_code == 422
        assert reply.json()["error"].startswith(error)
        assert len(reply.text) < 200
        assert (provider.behaviour, provider.state["delay"]) == ("accept", 10.0)

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
    def test_nan_and_infinity_are_refused_as_a_delay(
        self, provider: MockProvider, client: requests.Session, number: str
    ) -> None:
        body = f'{{"behaviour": "slow", "delay": {number}}}'
        headers = {"Content-Type": "application/json; charset=utf-8"}

        reply = client.put(f"{provider.url}behaviour", data=body, headers=headers)

        assert reply.status_code == 422
        assert provider.behaviour == "accept"

    @pytest.mark.parametrize(
        "content_type", ["text/plain", "", "application/x-www-form-urlencoded"]
    )
    def test_a_cross_site_request_changes_nothing(
        self, provider: MockProvider, client: requests.Session, content_type: str
    ) -> None:
        body, headers = b'{"behaviour": "503"}', {"Content-Type": content_type}

        reply = client.put(f"{provider.url}behaviour", data=body, headers=headers)

        assert reply.status_code == 415
        assert provider.behaviour == "accept"


class TestClearing:
    def test_delete_forgets_the_messages_and_counts_from_zero(
        self, provider: MockProvider, client: requests.Session, post: Any
    ) -> None:
        post()

        reply = client.delete(f"{provider.url}messages", timeout=5)

        assert reply.json() == {"provider": "email 1", "total": 0, "messages": []}
        post(title="next")
        assert [message.title for message in provider.messages] == ["next"]
        assert (provider.total, provider.accepted) == (1, 1)

    def test_a_message_that_waited_for_its_answer_stays_away(
        self, provider: MockProvider, post: Any
    ) -> None:
        provider.switch("slow", 60)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(post)
            eventually(lambda: provider.total == 1)
            provider.clear()
            provider.switch("accept")
            assert waiting.result(timeout=5).status_code == 200

        assert (provider.messages, provider.total, provider.accepted) == ((), 0, 0)

    def test_only_accepted_messages_count_as_accepted(
        self, provider: MockProvider, post: Any
    ) -> None:
        for behaviour in ("accept", "503", "429", "slow"):
            provider.switch(behaviour, 0)
            post()

        assert (provider.total, provider.accepted) == (4, 2)


class TestHosts:
    @pytest.mark.parametrize("host", ["127.0.0.1:9090", "localhost", "[::1]:9090", "192.168.0.7"])
    def test_an_address_or_localhost_is_answered(
        self, provider: MockProvider, client: requests.Session, host: str
    ) -> None:
        reply = client.get(f"{provider.url}messages", headers={"Host": host}, timeout=5)

        assert reply.status_code == 200

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:9090", "[::1", "127.0.0.1.nip.io"]
    )
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    def test_another_name_is_refused_since_a_foreign_page_may_own_it(
        self, provider: MockProvider, client: requests.Session, method: str, host: str
    ) -> None:
        path = "behaviour" if method == "PUT" else "messages"
        headers = {"Host": host}
        reply = client.request(method, provider.url + path, json={}, headers=headers, timeout=5)

        assert reply.status_code == 421

    def test_a_message_may_come_by_any_name(
        self, provider: MockProvider, client: requests.Session
    ) -> None:
        headers = {"Host": "providers:9090"}

        assert client.post(provider.url, json=NOTIFICATION, headers=headers).status_code == 200

    @pytest.mark.parametrize("path", ["messages", "behaviour", "messages?x=1", "nothing"])
    def test_every_reply_is_neither_stored_nor_sniffed_and_head_works(
        self, provider: MockProvider, client: requests.Session, path: str
    ) -> None:
        get, head = client.get(provider.url + path), client.head(provider.url + path)

        assert head.status_code == get.status_code
        assert head.content == b""
        assert head.headers["Content-Length"] == str(len(get.content))
        for reply in (get, head):
            assert reply.headers["Cache-Control"] == "no-store"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"


class TestConnections:
    def test_a_connection_serves_one_request_after_another(self, provider: MockProvider) -> None:
        connection = http.client.HTTPConnection(HOST, provider.port, timeout=5)
        sockets = set()
        for _ in range(3):
            connection.request("POST", "/", json.dumps(NOTIFICATION))
            connection.getresponse().read()
            sockets.add(connection.sock)
        connection.close()

        assert len(sockets) == 1
        assert None not in sockets

    def test_stop_closes_the_port_and_the_kept_connections_and_leaves_no_thread(self) -> None:
        before = set(threading.enumerate())
        provider = MockProvider("email 1", 0)
        provider.start()
        connection = http.client.HTTPConnection(HOST, provider.port, timeout=5)
        connection.request("GET", "/behaviour")
        connection.getresponse().read()

        provider.stop()
        provider.stop()

        assert connection.sock.recv(1) == b""
        connection.close()
        assert set(threading.enumerate()) <= before
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, provider.port), timeout=5)

    def test_stop_ends_the_wait_of_slow_answers(self) -> None:
        provider = MockProvider("email 1", 0)
        provider.switch("slow", 60)
        provider.start()
        with socket.create_connection((HOST, provider.port), timeout=5) as connection:
            connection.sendall(raw_notification())
            eventually(lambda: provider.total == 1)
            began = time.monotonic()

            provider.stop()

        assert time.monotonic() - began < 30  # and not 60
        assert "waiting" not in provider.messages[0].answer

    def test_a_provider_that_never_started_can_be_stopped(self) -> None:
        provider = MockProvider("email 1", 0)

        provider.stop()

        with MockProvider("email 2", provider.port) as successor:
            assert successor.url == f"http://127.0.0.1:{provider.port}/"

    def test_a_taken_port_is_an_error(self, provider: MockProvider) -> None:
        with pytest.raises(OSError, match="in use"):
            MockProvider("email 2", provider.port)

    def test_clients_that_go_away_leave_no_trace_on_stderr(
        self, provider: MockProvider, post: Any, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for start in (b"", b"POST / HT", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
            with socket.create_connection((HOST, provider.port), timeout=5) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                connection.sendall(start)
        post()
        provider.stop()

        assert capfd.readouterr() == ("", "")
