"""End to end: a real gunicorn with two workers, a real PostgreSQL, real HTTP providers."""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import requests

from tests.fixtures import connect, create_database
from tests.scripted_provider import Peer, Received, Script, answer, close, reset
from tests.service import MESSAGE, ROOT, Service, clean_environment
from tests.sockets import refusing
from tests.timing import eventually

StartService = Callable[..., Service]


def envelope(reply: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_buyer_gets_an_email_and_a_seller_an_email_and_a_push(
    start_service: StartService, make_provider, add_provider
):
    email, push = make_provider(), make_provider()
    add_provider(email.url, "Email")
    add_provider(push.url, "PushNotification")
    service = start_service()

    reply = service.notify("buyer")
    assert (reply.status_code, reply.json()) == (
        200,
        {"message": "notification sent successfully"},
    )
    assert (len(email.received), len(push.received)) == (1, 0)

    assert service.notify("seller").status_code == 200
    assert (len(email.received), len(push.received)) == (2, 1)
    assert push.received[0].json() == MESSAGE | {"secret_key": "s3cr3t-key"}


def test_each_of_many_concurrent_notifications_arrives_exactly_once(
    start_service: StartService, make_provider, add_provider
):
    email, push = make_provider(answer(202)), make_provider(answer(204, b""))
    add_provider(email.url, "Email")
    add_provider(push.url, "PushNotification")
    service = start_service(WEB_CONCURRENCY="2")
    titles = [f"number {n}" for n in range(100)]

    with ThreadPoolExecutor(20) as callers:
        replies = callers.map(
            lambda title: service.notify("seller", json=MESSAGE | {"title": title}), titles
        )
        assert [reply.status_code for reply in replies] == [200] * len(titles)

    for provider in (email, push):
        assert sorted(r.json()["title"] for r in provider.received) == sorted(titles)


def test_a_failing_provider_is_passed_over_and_then_skipped_by_its_breaker(
    start_service: StartService, make_provider, add_provider
):
    down, up = make_provider(answer(503)), make_provider()
    add_provider(down.url, priority=1)
    add_provider(up.url, priority=2)
    service = start_service(WEB_CONCURRENCY="1")

    assert [service.notify().status_code for _ in range(5)] == [200] * 5
    assert (len(down.received), len(up.received)) == (3, 5)
    changes = [line for line in service.lines() if line["logger"] == "notifier.breakers"]
    assert [(c["host"], c["from_state"], c["to_state"]) for c in changes] == [
        (down.endpoint, "closed", "open")
    ]


def test_a_notification_fails_if_one_of_its_channels_has_no_provider(
    start_service: StartService, make_provider, add_provider
):
    email = make_provider()
    add_provider(email.url, "Email")
    reply = start_service().notify("seller")
    assert reply.status_code == 500
    assert reply.json() == {"error": {"code": "E102", "message": "internal server error"}}
    assert len(email.received) == 1  # the other channel was not cancelled


def test_the_request_id_reaches_providers_and_log_lines_even_from_pool_threads(
    start_service: StartService, make_provider, add_provider
):
    email, push = make_provider(), make_provider(answer(500))
    add_provider(email.url, "Email")
    add_provider(push.url, "PushNotification")
    service = start_service()

    reply = service.notify("seller", headers={"X-Request-Id": "order 4711"})
    assert reply.headers["X-Request-Id"] == "order 4711"
    assert email.received[0].headers["x-request-id"] == "order 4711"
    assert push.received[0].headers["x-request-id"] == "order 4711"
    of_request = [line for line in service.lines() if line["request_id"] == "order 4711"]
    assert {"notifier.web.requests", "notifier.store.preferences", "notifier.attempts"} <= {
        line["logger"] for line in of_request
    }
    assert any(line.get("channel") == "PushNotification" for line in of_request)

    unusable = service.notify("seller", headers={"X-Request-Id": "x" * 129})
    assert len(unusable.headers["X-Request-Id"]) == 32


def lines_of(service: Service, request_id: str) -> list[dict[str, Any]]:
    """Return what an operator finds who greps the log for one request."""
    return [line for line in service.lines() if line["request_id"] == request_id]


def test_every_failed_request_is_explained_under_its_own_id(
    start_service: StartService, make_provider, add_provider
):
    """Those too that come within the second in which refusals of a breaker are logged once."""
    first, second = make_provider(answer(503)), make_provider(answer(429))
    add_provider(first.url, name="email 1", priority=1)
    add_provider(second.url, name="email 2", priority=2)
    service = start_service()
    ids = [f"request-{number}" for number in range(12)]
    for request_id in ids:
        assert service.notify(headers={"X-Request-Id": request_id}).status_code == 500

    for number, request_id in enumerate(ids):
        (request,) = (one for one in lines_of(service, request_id) if one["message"] == "request")
        assert (request["level"], request["code"]) == ("ERROR", "E102")
        (email,) = request["channels"]
        ended = [(one["provider"], one["outcome"], one["reason"]) for one in email["providers"]]
        if number < 3:
            assert ended == [("email 1", "unknown", "503"), ("email 2", "not_sent", "429")]
            assert all(isinstance(one["ms"], int) for one in email["providers"])
        else:
            assert ended == [("email 1", "skipped", "open"), ("email 2", "skipped", "open")]
            assert not any("ms" in one for one in email["providers"])
    skipped = [line for line in service.lines() if line["message"] == "provider skipped"]
    assert {line["level"] for line in skipped} == {"WARNING"}
    assert 2 <= len(skipped) < 2 * 9  # not one for each request
    failed = [line for line in service.lines() if line["message"] == "attempt failed"]
    assert len(failed) == 2 * 3


def test_a_channel_whose_providers_cannot_be_read_is_explained_under_each_requests_id(
    start_service: StartService,
):
    with refusing() as port:
        service = start_service(DB_PORT=str(port))
        ids = [f"request-{number}" for number in range(5)]
        for request_id in ids:
            reply = service.notify("seller", headers={"X-Request-Id": request_id})
            assert reply.status_code == 500
    for request_id in ids:
        lines = lines_of(service, request_id)
        (request,) = (line for line in lines if line["message"] == "request")
        assert [one["providers"] for one in request["channels"]] == [[], []]
        unread = [line for line in lines if line["message"] == "preferences unavailable"]
        assert {line["channel"] for line in unread} == {"Email", "PushNotification"}


@pytest.fixture(scope="module")
def idle_service(tmp_path_factory: pytest.TempPathFactory, server, _migrated) -> Iterator[Service]:
    """A service for requests that never reach a provider."""
    database = create_database(server, _migrated["DB_NAME"])
    service = Service(tmp_path_factory.mktemp("idle"), database)
    yield service.wait_until_ready()
    assert service.stop() == 0


RAW = "POST /api/v1.0/recipient/buyer/notify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
UPGRADE = "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
CHUNKED = f"{RAW}Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("request_text", "status", "code"),
    [
        (f"{RAW}Content-Length: 100\r\n\r\n{{", 422, "E101"),
        (f"{CHUNKED}1\r\n{{\r\n0\r\n\r\n", 422, "E101"),
        (f"{CHUNKED}zz\r\n{{\r\n0\r\n\r\n", 422, "E101"),
        (CHUNKED + f"8000\r\n{'x' * 0x8000}\r\n" * 9 + "0\r\n\r\n", 413, "E105"),
        (f"{RAW}Content-Length: 262145\r\n\r\n{'x' * 262145}", 413, "E105"),
        (f"{RAW}Content-Length: 90\r\n\r\n{json.dumps(MESSAGE)}", 422, "E101"),
        (RAW.replace("/api/", "/api//") + "\r\n", 404, "E103"),
        (RAW.replace("buyer", "%FF") + "Content-Length: 2\r\n\r\n{}", 422, "E101"),
        (RAW.replace("POST", "PURGE") + "\r\n", 405, "E104"),
        (UPGRADE, 422, "E101"),
        (f"{RAW}SCRIPT_NAME: /zzz\r\nContent-Length: 2\r\n\r\n{{}}", 422, "E101"),
    ],
    ids=[
        "cut",
        "chunked",
        "bad-chunk",
        "chunked-too-large",
        "too-large",
        "cut-after-json",
        "slashes",
        "path",
        "verb",
        "upgrade",
        "script-name",
    ],
)
def test_a_malformed_request_gets_an_error_in_the_common_format_and_never_a_500(
    idle_service: Service, request_text: str, status: int, code: str
):
    reply = idle_service.send_raw(request_text.encode(), half_close=True)
    assert envelope(reply)[0] == status
    assert envelope(reply)[1]["code"] == code
    assert not {line["level"] for line in idle_service.lines()} & {"ERROR", "CRITICAL"}


def test_a_body_that_stalls_releases_its_thread(idle_service: Service):
    reply = idle_service.send_raw(f"{RAW}Content-Length: 100\r\n\r\n{{".encode())
    assert envelope(reply)[0] == 422


def test_gunicorn_logs_json_and_names_go_variables_without_effect(
    start_service: StartService,
):
    go = {"GIN_MODE": "release", "CACHE_MAX_COST": "1000"}
    service = start_service(WEB_CONCURRENCY="2", APP_NAME="shop", **go)
    assert service.stop() == 0
    lines = service.lines()
    assert {line["app"] for line in lines} == {"shop"}
    named = [line["variables"] for line in lines if "variables" in line]
    assert named == [["GIN_MODE", "CACHE_MAX_COST"]]


def test_a_start_warns_once_of_variables_that_are_perhaps_misspelt(start_service: StartService):
    misspelt = {"DB_SLMODE": "s3cr3t-value", "WEB_THREAD": "s3cr3t-value"}
    service = start_service(WEB_CONCURRENCY="2", **misspelt)
    service.notify()
    assert service.stop() == 0
    (told,) = (line for line in service.lines() if "variables" in line)
    assert (told["level"], told["logger"]) == ("WARNING", "notifier.settings")
    assert told["variables"] == [
        {"name": "DB_SLMODE", "nearest": "DB_SSLMODE"},
        {"name": "WEB_THREAD", "nearest": "WEB_THREADS"},
    ]
    assert "s3cr3t-value" not in service.log.read_text()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "DB_HOST is missing"),
        ({"DB_PORT": "abc"}, 'DB_PORT is "abc": expected a whole number from 1 to 65535'),
        ({"HTTP_CLIENT_TIMEOUT": "5"}, 'HTTP_CLIENT_TIMEOUT is "5": expected a duration'),
        ({"WEB_CONCURRENCY": "0"}, 'WEB_CONCURRENCY is "0": expected'),
        ({"ALL_PROXY": "socks5://a"}, "ALL_PROXY cannot be used (its scheme is neither"),
        ({"HTTP_PROXY": "http://proxy.corp:port"}, "HTTP_PROXY cannot be used (its port is"),
        ({"https_proxy": "http://"}, "https_proxy cannot be used (it has no valid host)"),
    ],
)
@pytest.mark.usefixtures("processes")
def test_a_wrong_environment_stops_the_start_with_one_line(
    variables: dict[str, str], expected: str
):
    stopped = subprocess.run(
        [sys.executable, "-m", "gunicorn"],
        cwd=ROOT,
        env=clean_environment() | variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert stopped.returncode == 1
    assert stopped.stdout == ""
    assert stopped.stderr.count("\n") == 1
    assert expected in stopped.stderr


def test_a_killed_worker_is_replaced_and_costs_only_its_requests_under_way(
    start_service: StartService, make_provider, add_provider
):
    add_provider(make_provider().url)
    service = start_service(WEB_CONCURRENCY="2")
    victim = service.booted()[0]
    count = itertools.count()

    def notify(_: int) -> int | None:
        if next(count) == 50:
            victim.send_signal(signal.SIGKILL)
        try:
            return service.notify().status_code
        except requests.RequestException:  # the worker died with this request
            return None

    with ThreadPoolExecutor(8) as callers:
        outcomes = list(callers.map(notify, range(300)))
    assert set(outcomes) <= {200, None}
    assert outcomes.count(None) <= 8
    psutil.wait_procs([victim], timeout=10)
    service.wait_until_ready()
    assert victim.pid not in [worker.pid for worker in service.booted()]
    assert [service.notify().status_code for _ in range(10)] == [200] * 10


SECRET, RECIPIENT, TEXT = "Sesame-0-pen", "very.private@example.com", "Nobody may read this"


def echo(status: int, *more: str) -> Script:
    """Return a script whose answer leaks everything that the provider received."""
    return lambda peer, got: answer(status, got.body, f"X-Echo: {SECRET}", *more)(peer, got)


def echo_garbage(peer: Peer, got: Received) -> None:
    peer.send(got.body + b"\r\n\r\n")
    peer.close()


def echo_bad_header(peer: Peer, got: Received) -> None:
    peer.send(b"HTTP/1.1 500 No\r\n" + got.body + b"\r\nContent-Length: 0\r\n\r\n")


TELL_TALES = (
    echo(500),
    echo(400),
    echo(429),
    echo(302, f"Location: http://[{SECRET}/{RECIPIENT}"),
    echo_garbage,
    echo_bad_header,
    reset,
    close,
)


def test_no_secret_recipient_or_text_is_ever_logged(
    start_service: StartService, make_provider, add_provider
):
    planted = {"to": RECIPIENT, "title": TEXT, "message": TEXT}
    urls = [make_provider(script).url for script in TELL_TALES]
    urls += ["ftp://x", "http://127.0.0.1:1/", f"https://{make_provider().endpoint}/"]
    for priority, url in enumerate(urls):
        add_provider(f"{url}?key={SECRET}", priority=priority, secret_key=SECRET)
    service = start_service(WEB_CONCURRENCY="1", HTTP_CLIENT_TIMEOUT="1s")

    assert [service.notify("seller", json=planted).status_code for _ in range(5)] == [500] * 5
    for body in (f'{{"to": "{RECIPIENT}", {TEXT}', f'{{"to": {TEXT}}}', f'"{TEXT}"'):
        assert service.notify(data=body).status_code == 422
    assert service.notify(json=planted | {"title": f"{TEXT}\n"}).status_code == 422
    # The rest of a body that is longer than announced is read as the next request.
    for end in ("\r\n\r\n", ""):
        overrun = f"Content-Length: 2\r\n\r\n{{}}{json.dumps(planted)}{end}"
        request = f"{RAW.replace('close', 'keep-alive')}{overrun}"
        service.send_raw(request.encode(), half_close=True)
    service.send_raw(f"{RAW}X-Bad Header: {TEXT}\r\n\r\n".encode())
    # A caller that omits the length, and one that counts characters instead of bytes.
    unmeasured = RAW.replace("close", "keep-alive")
    service.send_raw(f"{unmeasured}\r\n{json.dumps(planted)}".encode(), half_close=True)
    long = json.dumps(planted | {"title": "é" * 60}, ensure_ascii=False)
    head = f"{unmeasured}Content-Length: {len(long)}\r\n\r\n"
    service.send_raw(f"{head}{long}".encode(), half_close=True)
    service.send_raw(f"{RAW.replace('buyer', RECIPIENT)}\r\n".encode())
    service.send_raw(f"{RAW.replace('POST', SECRET.upper())}\r\n".encode())
    assert service.stop() == 0

    log = service.log.read_text()
    assert {line["level"] for line in service.lines()} == {"DEBUG", "INFO", "WARNING", "ERROR"}
    for secret in (SECRET, SECRET.upper(), RECIPIENT, TEXT):
        assert secret not in log
    assert "v***@example.com" in log


def test_a_rotated_password_is_used_without_a_restart(
    start_service: StartService, database, make_provider, add_provider, tmp_path
):
    """An open connection stays usable; the next connection reads the file again."""
    role = f"rotating_{database['DB_NAME']}"
    file = tmp_path / "password"
    file.write_text("first\n")
    with connect(database) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
        owner.execute(f"GRANT SELECT ON notification_preferences TO {role}")
        service = start_service(DB_USERNAME=role, DB_PASSWORD="", DB_PASSWORD_FILE=str(file))
        service.wait_until_listening()
        owner.execute(f"ALTER ROLE {role} PASSWORD 'second'")
        file.write_text("second\n")
        owner.execute(f"GRANT {role} TO {owner.info.user}")
        owner.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (role,)
        )
    eventually(lambda: service.metric("preference_listener_reconnects_total") >= 1)
    service.wait_until_listening()
    add_provider(make_provider().url)
    eventually(lambda: service.notify().status_code == 200)
