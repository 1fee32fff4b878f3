"""Slow callers cost a connection, but neither a thread nor the time of other callers."""

import json
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests

from notifier.serving.caller import HEAD_BYTES, REQUEST_SECONDS
from notifier.serving.worker import MAX_HELD_BYTES
from notifier.settings import MAX_BODY_BYTES
from tests.fixtures import MakeProvider
from tests.scripted_provider import Peer, Received, answer
from tests.service import MESSAGE, Service
from tests.sockets import until_the_end
from tests.timing import eventually, within

StartService = Callable[..., Service]
AddProvider = Callable[..., int]

MANY = 60  # many more than the threads of a worker with WEB_THREADS=2
BODY = json.dumps(MESSAGE).encode()
HEAD = (
    b"POST /api/v1.0/recipient/buyer/notify HTTP/1.1\r\n"
    b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(BODY)
)
LAST = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
OK, WRONG = b"HTTP/1.1 200 ", b"HTTP/1.1 422 "


@pytest.fixture
def service(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> Service:
    add_provider(make_provider().url)
    return start_service(WEB_CONCURRENCY="1", WEB_THREADS="2").wait_until_listening()


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=30)


@contextmanager
def callers(service: Service, data: bytes, count: int = MANY) -> Iterator[list[socket.socket]]:
    """Connect `count` callers, each of which has sent `data`."""
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(service)) for _ in range(count)]
        for sock in socks:
            sock.sendall(data)
        yield socks


def answers_at_once(service: Service) -> None:
    with within(1):
        assert requests.get(f"{service.url}/healthz", timeout=30).status_code == 200
    with within(1):
        assert service.notify().status_code == 200


@pytest.mark.parametrize("data", [b"", b"G", HEAD[:-1], HEAD[: len(HEAD) // 2]])
def test_callers_with_incomplete_heads_do_not_block_a_worker(service: Service, data: bytes) -> None:
    with callers(service, data):
        answers_at_once(service)
        assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


def test_a_head_may_arrive_in_pieces_and_the_next_request_with_it(service: Service) -> None:
    with connect(service) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in HEAD:
            sock.send(bytes([byte]))
        sock.sendall(BODY + HEAD[:20])
        assert until(b"successfully", sock).startswith(OK)
        stays_open(sock, 0.4)
        sock.sendall(HEAD[20:-1])
        stays_open(sock, 0.2)
        sock.sendall(HEAD[-1:] + BODY + HEAD + BODY)
        replies = until(b"successfully", sock, times=2)
        assert replies.count(OK) == 2
    assert service.metric("notifications_total", outcome="delivered") == 3


def until(text: bytes, sock: socket.socket, times: int = 1) -> bytes:
    """Read until `text` has come `times` times, up to the end of that line."""
    data = b""
    while data.count(text) < times or not data.endswith(b"\n"):
        chunk = sock.recv(65536)
        assert chunk
        data += chunk
    return data


def stays_open(sock: socket.socket, seconds: float) -> None:
    sock.settimeout(seconds)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    sock.settimeout(30)


def test_a_head_that_is_completed_while_the_worker_stops_is_answered(service: Service) -> None:
    with callers(service, HEAD[:20], count=3) as socks:
        answers_at_once(service)  # after them, so their heads have been read
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: "Handling signal: term" in service.log.read_text())
        for sock in socks:
            sock.sendall(HEAD[20:] + BODY)
        for sock in socks:
            assert until_the_end(sock).startswith(OK)
    assert service.process.wait(30) == 0


def test_a_dripping_head_is_closed_at_its_limit(service: Service) -> None:
    with connect(service) as sock:
        assert drip(sock, b"GET /healthz HTTP/1.1\r\n", b"X: y\r\n") == b""


def test_a_dripping_body_is_refused_in_time(service: Service) -> None:
    with connect(service) as sock:
        assert drip(sock, HEAD.replace(b"%d" % len(BODY), b"1000"), b" ").startswith(WRONG)
        sock.settimeout(30)
        until_the_end(sock)


def drip(sock: socket.socket, begin: bytes, then: bytes) -> bytes:
    """Send `begin`, then `then` repeatedly, until there is an answer, which must come in time."""
    give_up = time.monotonic() + 3 * REQUEST_SECONDS
    sock.sendall(begin)
    sock.settimeout(0.2)
    while True:
        assert time.monotonic() < give_up
        try:
            return sock.recv(65536)
        except TimeoutError:
            sock.sendall(then)
        except ConnectionResetError:
            return b""


CHUNKED = HEAD.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    "data",
    [HEAD, HEAD + BODY[:1], HEAD + BODY[:-1], CHUNKED, CHUNKED + b"5\r\nabc", CHUNKED + b"0\r\n"],
)
def test_incomplete_bodies_hold_neither_a_thread_nor_a_place(service: Service, data: bytes) -> None:
    with callers(service, data) as socks:
        for _ in range(10):
            answers_at_once(service)
        assert service.metric("http_server_active_requests") == 0
        for sock in socks:
            assert sock.recv(65536).startswith(WRONG)
    assert service.metric("http_server_requests_total", http_status_code="422") == MANY
    assert service.metric("notifications_refused_total") == 0


def test_a_body_may_arrive_in_pieces_and_the_next_request_with_it(service: Service) -> None:
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nX: y\r\n\r\n"
    with connect(service) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for request in (HEAD + BODY, CHUNKED + chunks):
            for byte in request[:-1]:
                sock.send(bytes([byte]))
            stays_open(sock, 0.1)
            sock.sendall(request[-1:] + PING)
            assert until(b"running", sock).count(OK) == 2
    assert service.metric("notifications_total", outcome="delivered") == 2


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1\nHost: x\n\n", 400),
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET /" + b"x" * HEAD_BYTES, 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 431),
    ],
    ids=["bare line feeds", "no version", "long line", "long field"],
)
def test_a_malformed_head_is_refused(service: Service, head: bytes, status: int) -> None:
    with connect(service) as sock:
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 %d " % status)


def test_callers_that_do_not_close_after_the_last_reply_do_not_block_a_worker(
    service: Service,
) -> None:
    with callers(service, LAST) as socks:
        for sock in socks:
            assert until_the_end(sock).startswith(OK)
        answers_at_once(service)
        for sock in socks:
            sock.sendall(b"x" * 1000)  # dropped without a reset
        answers_at_once(service)
        for sock in socks:
            assert sock.recv(65536) == b""


def test_a_caller_that_goes_on_sending_after_the_last_reply_is_closed_at_its_limit(
    service: Service,
) -> None:
    def is_cut(sock: socket.socket) -> bool:
        try:
            sock.sendall(b"x")
        except OSError:
            return True
        return False

    with connect(service) as sock:
        sock.sendall(LAST)
        assert until_the_end(sock).startswith(OK)
        eventually(lambda: is_cut(sock), 3 * REQUEST_SECONDS)


def test_connections_are_closed_when_their_callers_leave(service: Service) -> None:
    (worker,) = service.booted()

    def held() -> int:
        ours = [each for each in worker.net_connections() if each.laddr.port == service.port]
        return len(ours) - 1  # one is the listener

    for data in (b"", HEAD[:20], HEAD, LAST, HEAD + BODY):
        with callers(service, data, count=20):
            eventually(lambda: held() >= 20)
        eventually(lambda: held() == 0)


def test_a_caller_that_falls_silent_within_a_head_is_cut_off_after_its_time(
    service: Service,
) -> None:
    with connect(service) as sock:
        sock.sendall(HEAD[:20])
        began = time.monotonic()
        sock.settimeout(REQUEST_SECONDS + 10)
        assert until_the_end(sock) == b""
        assert time.monotonic() - began >= REQUEST_SECONDS


def test_incomplete_heads_that_are_too_long_hold_no_thread(service: Service) -> None:
    field = b"X: " + b"y" * 8000 + b"\r\n"
    long = HEAD[:-2] + field * (HEAD_BYTES // len(field) + 1)
    with callers(service, long, count=20):
        answers_at_once(service)


def test_callers_that_do_not_read_their_replies_do_not_block_a_worker(service: Service) -> None:
    """There are more of them than threads, each with more replies than the kernel buffers."""
    page = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", service.port))
            sock.settimeout(0.3)
            with suppress(TimeoutError):
                sock.sendall(page * 3000)
        with within(REQUEST_SECONDS + 10):
            assert requests.get(f"{service.url}/healthz", timeout=30).status_code == 200


def test_part_of_the_next_head_after_a_body_holds_no_thread(service: Service) -> None:
    with callers(service, HEAD, count=20) as socks:
        for sock in socks:
            sock.sendall(BODY + b"G")
        for sock in socks:
            assert sock.recv(65536)
        answers_at_once(service)


PING = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def busy(socks: list[socket.socket]) -> Iterator[None]:
    """Let each caller send its next request as soon as it has read a reply."""
    enough = threading.Event()

    def call() -> None:
        with selectors.DefaultSelector() as selector:
            for sock in socks:
                selector.register(sock, selectors.EVENT_READ)
            while not enough.is_set():
                for key, _ in selector.select(0.1):
                    assert until(b"running", key.fileobj).startswith(OK)  # type: ignore[arg-type]
                    key.fileobj.sendall(PING)  # type: ignore[union-attr]

    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(call)
        try:
            yield
        finally:
            enough.set()
        calling.result()


def test_a_new_connection_is_answered_beside_more_busy_ones_than_there_are_threads(
    service: Service,
) -> None:
    with callers(service, PING) as socks, busy(socks):
        for _ in range(10):
            answers_at_once(service)


def test_pipelined_requests_are_answered_one_by_one(service: Service) -> None:
    """Each waits for a thread behind other callers' requests (see `Poller.after_others`)."""
    many = 500  # more than the worker reads at once
    with callers(service, PING * many, count=10) as socks:
        answers_at_once(service)
        for sock in socks:
            assert until(b"running", sock, times=many).count(OK) == many


IMPATIENT = """
import runpy

globals().update(runpy.run_path("gunicorn.conf.py"))

from notifier.serving import turns as serving

serving.THREAD_IDLE_SECONDS = 0.3
"""


def test_threads_start_when_requests_need_them_and_end_when_they_do_not(
    start_service: StartService,
    make_provider: MakeProvider,
    add_provider: AddProvider,
    tmp_path: Path,
) -> None:
    config = tmp_path / "impatient.py"
    config.write_text(IMPATIENT)
    let = threading.Event()

    def provide(peer: Peer, received: Received) -> None:
        let.wait(30)
        answer()(peer, received)

    add_provider(make_provider(provide).url)
    service = start_service(
        WEB_CONCURRENCY="1", GUNICORN_CMD_ARGS=f"--config {config}"
    ).wait_until_listening()
    (worker,) = service.booted()
    few = 10  # the main thread, the refresher's, and a few from the start
    assert worker.num_threads() < few
    with ThreadPoolExecutor(20) as pool:
        replies = [pool.submit(service.notify) for _ in range(20)]
        eventually(lambda: worker.num_threads() > 20)
        let.set()
        assert {reply.result().status_code for reply in replies} == {200}
    eventually(lambda: worker.num_threads() < few)
    assert service.notify().status_code == 200


def test_without_keep_alive_each_reply_closes_its_connection(start_service: StartService) -> None:
    service = start_service(GUNICORN_CMD_ARGS="--keep-alive 0")
    reply = requests.get(f"{service.url}/healthz", timeout=10)
    assert reply.headers["Connection"] == "close"


@pytest.fixture
def small(
    start_service: StartService, make_provider: MakeProvider, add_provider: AddProvider
) -> Service:
    """A service that has room for 200 connections."""
    add_provider(make_provider().url)
    arguments = "--worker-connections 200"
    return start_service(
        WEB_CONCURRENCY="1", WEB_THREADS="2", GUNICORN_CMD_ARGS=arguments
    ).wait_until_listening()


@pytest.mark.parametrize("data", [b"", b"\r\n", b"G", HEAD[:-1], HEAD, HEAD + BODY[:1], LAST])
def test_a_worker_that_is_nearly_full_drops_the_connections_that_are_idle_for_longest(
    small: Service, data: bytes
) -> None:
    with connect(small) as kept, ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(callers(small, data, count=50))
            kept.sendall(PING)  # it is not idle for longest
            assert until(b"running", kept).startswith(OK)
            answers_at_once(small)
    (worker,) = small.booted()
    assert len(worker.net_connections()) < 200 + 20
    assert "not accepted" not in small.log.read_text()


def test_a_connection_has_5_seconds_for_its_first_byte(service: Service) -> None:
    with connect(service) as silent, connect(service) as kept:
        kept.sendall(PING)
        assert until(b"running", kept).startswith(OK)
        began = time.monotonic()
        silent.sendall(b"\r\n")
        silent.settimeout(REQUEST_SECONDS + 10)
        assert silent.recv(1) == b""
        assert time.monotonic() - began >= REQUEST_SECONDS - 0.5
        kept.sendall(b"\r\n" + PING)
        assert until(b"running", kept).startswith(OK)


def test_an_empty_line_after_a_body_starts_no_clock(service: Service) -> None:
    with connect(service) as sock:
        sock.sendall(HEAD + BODY + b"\r\n")
        assert until(b"successfully", sock).startswith(OK)
        stays_open(sock, REQUEST_SECONDS + 2)
        sock.sendall(HEAD + BODY)
        assert until(b"successfully", sock).startswith(OK)


def test_a_body_that_is_expected_is_asked_for_at_once(service: Service) -> None:
    head = HEAD[:-2] + b"Expect: 100-continue\r\n\r\n"
    with connect(service) as sock:
        for _ in range(2):
            sock.sendall(head)
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            stays_open(sock, 0.1)
            sock.sendall(BODY)
            assert until(b"successfully", sock).startswith(OK)
        sock.sendall(head.replace(b"%d" % len(BODY), b"300000"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")  # and not asked for


def test_without_descriptors_a_worker_drops_idle_connections_and_goes_on(
    service: Service,
) -> None:
    (worker,) = service.booted()
    held = worker.num_fds()
    worker.rlimit(psutil.RLIMIT_NOFILE, (held + 20, held + 20))
    for _ in range(3):
        with callers(service, b"", count=40):
            for _ in range(3):
                assert requests.get(f"{service.url}/healthz", timeout=30).status_code == 200
    assert [each.pid for each in service.booted()] == [worker.pid]


def test_incomplete_requests_take_a_bounded_amount_of_memory(service: Service) -> None:
    (worker,) = service.booted()
    before = worker.memory_info().rss
    part = b" " * (MAX_BODY_BYTES - 1)
    count = 4 * MAX_HELD_BYTES // len(part)
    head = HEAD.replace(b"%d" % len(BODY), b"%d" % MAX_BODY_BYTES)
    closed = 0
    with callers(service, head, count=count) as socks:
        for sock in socks:
            with suppress(OSError):
                sock.sendall(part)
        for _ in range(3):
            answers_at_once(service)
        assert worker.memory_info().rss - before < 4 * MAX_HELD_BYTES
        for sock in socks:
            try:
                closed += not sock.recv(1)
            except ConnectionResetError:
                closed += 1
    assert closed >= count // 2


@pytest.mark.parametrize(
    "path",
    ["/api/v1.0/recipient/buyer/notify", "/api/v1.0/recipient/nobody/notify", "/healthz", "/"],
)
def test_a_body_that_is_too_large_closes_its_connection_and_no_other(
    service: Service, path: str
) -> None:
    with requests.Session() as session:
        for _ in range(3):
            reply = session.post(service.url + path, data=b" " * 300_000, timeout=30)
            assert reply.status_code in (405, 413, 422)
            assert reply.headers["Connection"] == "close"
            assert session.get(f"{service.url}/healthz", timeout=30).status_code == 200
    assert "Traceback" not in service.log.read_text()
    assert "could not serve" not in service.log.read_text()


@pytest.mark.parametrize("pieces", [1, 2, 30])
def test_a_head_that_is_too_long_is_refused(service: Service, pieces: int) -> None:
    head = PING[:-2] + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 4000) for n in range(90)) + b"\r\n"
    with connect(service) as sock:
        size = len(head) // pieces + 1
        with suppress(OSError):  # it is refused before its end
            for start in range(0, len(head), size):
                sock.sendall(head[start : start + size])
        assert sock.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_many_small_chunks_cost_little(service: Service) -> None:
    chunks = b"1\r\n \r\n" * 170_000  # close to the maximum
    with connect(service) as sock, within(10):
        sock.sendall(CHUNKED + chunks + b"0\r\n\r\n")
        assert sock.recv(65536).startswith(WRONG)


def test_a_half_body_behind_unread_replies_expires(service: Service) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", service.port))
        (worker,) = service.booted()
        page = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(40):
            sock.sendall(page)
        sock.sendall(HEAD + BODY[:-1])
        port = sock.getsockname()[1]

        def is_held() -> bool:
            return any(each.raddr and each.raddr.port == port for each in worker.net_connections())

        eventually(lambda: not is_held(), 5 * REQUEST_SECONDS)


def test_pipelined_requests_survive_the_closing_of_idle_connections(small: Service) -> None:
    """They wait in the worker, where the kernel does not see them."""
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(callers(small, b"", count=50))
            with callers(small, PING * 3, count=20) as socks:
                for sock in socks:
                    assert until(b"running", sock, times=3).count(OK) == 3
