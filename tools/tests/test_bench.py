"""Tests of `make bench` that do not need the packages which only it installs."""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import requests

from notifier.errors import PreferencesUnavailable
from notifier.models import Channel
from notifier.store.db import Database
from tests.fixtures import MakeProvider
from tests.scripted_provider import Peer, Received, Script, answer, close
from tests.service import MESSAGE
from tests.timing import eventually, within
from tools.bench import parts, report, stacks
from tools.bench.cold import ColdPreferences
from tools.bench.counters import cpu_seconds
from tools.bench.figures import (
    Figures,
    Goal,
    Memory,
    Point,
    capacity_goals,
    figures,
    latency_goals,
    main_goals,
    median,
    memory_goals,
    percentile,
    ratio,
    spread,
)
from tools.bench.load import (
    ATTEMPTS,
    BODY,
    PAUSE,
    evenness,
)
from tools.bench.parts import Main
from tools.bench.plan import take
from tools.bench.turns import Order, Turn, take_turn
from tools.rig import CannotMeasure

HEAD = b"POST /send HTTP/1.1\r\nHost: here\r\ncontent-length: 5\r\n\r\n"


def some(**fields: float) -> Figures:
    return Figures(**(dict.fromkeys(Figures._fields, 0.0) | fields))  # type: ignore[arg-type]


# --- the sink


@pytest.fixture(scope="module")
def providers(processes: None) -> Iterator[dict[str, str]]:
    with stacks.sink() as urls:
        yield urls


def connected(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=5)


def test_the_sink_keeps_a_connection_and_answers_each_request_once_it_is_complete(
    providers: dict[str, str],
) -> None:
    with connected(providers["fast"]) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"12")
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(5)
            connection.sendall(b"345")
            reply = connection.recv(4096)
            assert reply.startswith(b"HTTP/1.1 200 ")
            assert reply.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")


def test_the_slow_provider_delays_concurrent_requests_concurrently(
    providers: dict[str, str],
) -> None:
    with ExitStack() as stack, within(1.9):
        waiting = [stack.enter_context(connected(providers["slow"])) for _ in range(20)]
        for connection in waiting:
            connection.sendall(HEAD + b"12345")
        began = time.monotonic()
        for connection in waiting:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - began > 0.09


def test_the_failing_provider_answers_500(providers: dict[str, str]) -> None:
    assert requests.post(providers["failing"], json={}, timeout=5).status_code == 500


def test_the_sink_survives_a_caller_that_disconnects_early(providers: dict[str, str]) -> None:
    with connected(providers["slow"]) as connection:
        connection.sendall(HEAD + b"12345")
    assert requests.post(providers["slow"], json={}, timeout=5).ok


@pytest.mark.usefixtures("processes")
def test_the_sink_stops_at_the_end_of_its_block() -> None:
    with stacks.sink() as urls:
        pass
    with pytest.raises(ConnectionRefusedError):
        connected(urls["fast"])


# --- the load generator


def in_turn(*scripts: Script) -> Script:
    """Return a script that plays one script per request, and repeats the last one."""
    remaining = chain(scripts, repeat(scripts[-1]))

    def play_next(peer: Peer, received: Received) -> None:
        next(remaining)(peer, received)

    return play_next


def in_pieces(peer: Peer, _: Received) -> None:
    for piece in (b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\nfo", b"ur"):
        peer.send(piece)
        peer.pause(0.01)


def answer_and_close(peer: Peer, received: Received) -> None:
    answer(200, b"{}", "Connection: close")(peer, received)
    peer.close()


@pytest.mark.usefixtures("processes")
def test_callers_keep_their_connections_and_count_every_reply(
    make_provider: MakeProvider,
) -> None:
    provider = make_provider(answer())
    turn = take_turn(Order(provider.port, "/notify", callers=3, warm_up=5, count=20))
    assert len(turn.latencies) in range(20, 23)  # others may come together with the last one
    assert (turn.errors, turn.refused) == ({}, 0)
    assert provider.connections == 3
    assert len(provider.received) in range(25, 33)
    assert {(one.path, one.body) for one in provider.received} == {("/notify", BODY)}


@pytest.mark.usefixtures("processes")
def test_every_reply_has_its_own_latency(make_provider: MakeProvider) -> None:
    def slow(peer: Peer, received: Received) -> None:
        peer.pause(0.2)
        answer()(peer, received)

    provider = make_provider(in_turn(*[answer()] * 4, slow, slow, answer()))
    turn = take_turn(Order(provider.port, "/", callers=1, warm_up=2, count=10))
    assert [latency >= 200 for latency in turn.latencies] == [False] * 2 + [True] * 2 + [False] * 6
    assert 0.9 * sum(turn.latencies) / 1000 < turn.seconds < 5


@pytest.mark.usefixtures("processes")
def test_a_reply_can_arrive_in_pieces(make_provider: MakeProvider) -> None:
    turn = take_turn(Order(make_provider(in_pieces).port, "/", callers=1, warm_up=0, count=3))
    assert len(turn.latencies) == 3
    assert turn.errors == {}


@pytest.mark.usefixtures("processes")
def test_a_caller_pauses_after_a_503_and_then_retries(make_provider: MakeProvider) -> None:
    provider = make_provider(in_turn(answer(), *[answer(503)] * 2, answer()))
    turn = take_turn(Order(provider.port, "/", callers=1, warm_up=1, count=4))
    assert (len(turn.latencies), turn.refused, turn.errors) == (4, 2, {})
    assert turn.seconds >= 2 * PAUSE


@pytest.mark.parametrize(
    ("script", "error"), [(answer(500), "500"), (answer(302), "302"), (close, "closed")]
)
@pytest.mark.usefixtures("processes")
def test_any_other_reply_is_an_error_even_in_the_warm_up(
    make_provider: MakeProvider, script: Script, error: str
) -> None:
    provider = make_provider(in_turn(script, answer(), answer(), script, answer()))
    turn = take_turn(Order(provider.port, "/", callers=1, warm_up=1, count=3))
    assert len(turn.latencies) == 3
    assert turn.errors == {error: 2}


@pytest.mark.usefixtures("processes")
def test_a_connection_closed_after_a_reply_is_no_error(make_provider: MakeProvider) -> None:
    provider = make_provider(in_turn(answer_and_close, answer_and_close, answer()))
    turn = take_turn(Order(provider.port, "/", callers=1, warm_up=0, count=5))
    assert (len(turn.latencies), turn.errors) == (5, {})
    assert provider.connections == 3


@pytest.mark.usefixtures("processes")
def test_a_turn_ends_after_its_seconds(make_provider: MakeProvider) -> None:
    provider = make_provider(answer())
    with within(5):
        turn = take_turn(Order(provider.port, "/", callers=1, warm_up=0, seconds=0.2))
    assert turn.latencies
    assert turn.seconds < 2


@pytest.mark.usefixtures("processes")
def test_a_turn_with_a_wrong_reply_fails_the_measurement(
    make_provider: MakeProvider,
) -> None:
    stack = stacks.Stack(make_provider(in_turn(answer(500), answer())).port)
    with pytest.raises(CannotMeasure, match="'500': 1"):
        take(stack, "/", 1, 0, count=3)


@pytest.mark.parametrize(
    ("used", "workers", "expected"),
    [([3, 0.1, 3], 2, 1), ([0.1, 2, 6], 2, 0.5), ([0, 8], 2, 0), ([4, 4, 4, 0], 4, 0), ([], 2, 1)],
)
def test_evenness_is_the_least_use_of_a_worker_relative_to_an_equal_share(
    used: list[float], workers: int, expected: float
) -> None:
    assert evenness(used, workers) == pytest.approx(expected)


@pytest.mark.usefixtures("processes")
def test_callers_reconnect_while_a_worker_gets_none_of_them(make_provider: MakeProvider) -> None:
    """This process is the worker that gets all callers; the other worker is an idle process."""
    provider = make_provider(answer())
    order = Order(provider.port, "/", callers=2, warm_up=4, count=5, evenness=0.5)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as idle:
        eventually(lambda: psutil.Process(idle.pid).status() == psutil.STATUS_SLEEPING)
        two = replace(order, pids=[os.getpid(), idle.pid], workers=2)
        assert len(take_turn(two).latencies) in (5, 6)
    assert provider.connections == 2 * (ATTEMPTS + 1)
    assert take_turn(replace(order, pids=[os.getpid()])).errors == {}
    assert provider.connections == 2 * (ATTEMPTS + 2)


def test_cpu_seconds_include_all_threads_that_a_process_ever_had() -> None:
    assert cpu_seconds([os.getpid()]) == pytest.approx(time.process_time(), abs=0.05)
    assert cpu_seconds([os.getpid(), os.getpid()]) > 1.5 * time.process_time()


# --- the stacks


def test_a_stack_is_measured_and_stopped(providers: dict[str, str]) -> None:
    with stacks.compared(stacks.BARE, providers["fast"], workers=1, threads=2) as stack:
        processes = stack.processes()
        measured = take(stack, "/notify", 2, 5, count=50)
        use = stack.memory()
    assert 50 < measured.cpu < 20_000
    assert 1_000_000 / measured.rate > measured.cpu / psutil.cpu_count()
    assert 5 < use.workers < use.total < 200
    eventually(lambda: not any(process.is_running() for process in processes))


@pytest.mark.usefixtures("processes")
def test_the_error_of_a_stack_that_cannot_start_has_its_last_line_of_output() -> None:
    with pytest.raises(CannotMeasure, match="HTTP_SERVER_PORT"):  # noqa: SIM117
        with stacks.service({"HTTP_SERVER_PORT": "none"}):
            pass


@pytest.mark.parametrize("name", ["bare", "naive"])
def test_the_compared_apps_forward_the_notification(
    name: str, make_provider: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = make_provider(answer())
    monkeypatch.setenv("PROVIDER_URL", provider.url)
    monkeypatch.setenv("THREADS", "2")
    client = importlib.import_module(f"tools.bench.{name}").app.test_client()
    for _ in range(2):
        assert client.post("/notify", json=MESSAGE).status_code == 200
    assert [one.json() for one in provider.received] == [MESSAGE, MESSAGE]
    assert provider.connections == {"bare": 1, "naive": 2}[name]


def test_a_cold_cache_queries_postgresql_at_every_look_up() -> None:
    class Unreachable:
        wait, hosts, connects = 2.0, "nowhere:5432", 0

        def connect(self) -> None:
            self.connects += 1
            raise psycopg.OperationalError

    database = Unreachable()
    preferences = ColdPreferences(cast(Database, database), lifetime=600)
    for _ in range(3):
        with pytest.raises(PreferencesUnavailable):
            preferences.for_channel(Channel.EMAIL, time.monotonic() + 2)
    assert database.connects == 3


def test_opened_breakers_are_counted_over_all_hosts_and_former_states(
    make_provider: MakeProvider,
) -> None:
    lines = [
        'circuit_breaker_state_changes_total{from_state="half-open",host="a",to_state="open"} 0.0',
        'circuit_breaker_state_changes_total{from_state="closed",host="b",to_state="open"} 2.0',
        'circuit_breaker_state_changes_total{from_state="open",host="b",to_state="closed"} 5.0',
        'circuit_breaker_state_changes_total{from_state="closed",host="a",to_state="open"} 1.0',
    ]
    provider = make_provider(answer(200, "\n".join([*lines, ""]).encode()))
    assert stacks.breakers_opened(stacks.Stack(provider.port)) == 3


# --- figures


@pytest.mark.parametrize(
    ("values", "rank", "expected"),
    [([7], 50, 7), ([7], 99, 7), ([3, 1, 2], 50, 2), ([4, 3, 1, 2], 50, 2), (range(100), 99, 98)],
)
def test_percentiles_are_nearest_ranks(values: list[float], rank: int, expected: float) -> None:
    assert percentile(values, rank) == expected


def test_figures_are_per_reply_and_per_second() -> None:
    turn = Turn(seconds=2.0, cpu=0.004, latencies=[1.0, 2.0, 9.0, 3.0], refused=5)
    assert figures(turn, busy=0.5) == Figures(cpu=1000, rate=2, p50=2, p99=9, refused=5, busy=0.5)


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """In the second round a slow machine doubles both; the third round is an outlier."""
    ours = [some(cpu=11), some(cpu=24), some(cpu=90)]
    theirs = [some(cpu=10), some(cpu=20), some(cpu=10)]
    assert ratio(ours, theirs).median == pytest.approx(1.2)
    with pytest.raises(ValueError, match="shorter"):
        ratio(ours, theirs[:2])


def test_a_spread_has_quartiles_and_each_figure_has_its_own_median() -> None:
    assert spread([5, 1, 3, 2, 4]) == (2, 3, 4)
    assert spread([5]) == (5, 5, 5)
    assert median([some(cpu=1, p50=9), some(cpu=3, p50=8), some(cpu=2, p50=7)]) == some(
        cpu=2, p50=8
    )


# --- goals


def verdicts(goals: list[Goal]) -> list[str]:
    return [goal.verdict for goal in goals]


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal("", 1.1, 1.1), "met"),
        (Goal("", 1.1, 1.11), "NOT MET"),
        (Goal("", 0.95, 0.95, at_least=True), "met"),
        (Goal("", 0.95, 0.94, at_least=True), "NOT MET"),
        (Goal("", 0.95, None), "not measured"),
    ],
)
def test_a_goal_is_met_at_its_bound(goal: Goal, verdict: str) -> None:
    assert goal.verdict == verdict


def test_the_cpu_goals_compare_the_rows_that_they_name() -> None:
    cpu = {"bare": 100, "naive": 200, "FastAPI + httpx": 300, "FastAPI + httpx, uvloop": 200}
    ours = {"buyer": 150, "seller": 300, "breaker open": 153}
    rows = {name: [some(cpu=one)] for name, one in cpu.items()}
    rows |= {f"notifier, {name}": [some(cpu=one)] for name, one in ours.items()}
    measured = [goal.measured for goal in main_goals(rows)]
    assert measured == pytest.approx([1.5, 0.75, 0.5, 0.75, 2.0, 1.02])


def test_the_throughput_goal_takes_the_worst_point_that_the_cpus_did_not_limit() -> None:
    def point(rate: float, busy: float) -> Point:
        return Point("notifier", 2, 16, 100, 64, some(rate=rate, busy=busy))

    fine, worse, limited = point(315, 0.5), point(300, 0.5), point(200, 0.95)
    assert verdicts(capacity_goals([fine, limited])) == ["met"]
    (goal,) = capacity_goals([fine, worse, limited])
    assert goal.measured == pytest.approx(300 / 320)
    assert goal.verdict == "NOT MET"
    assert verdicts(capacity_goals([limited])) == ["not measured"]


def test_the_latency_goals_compare_with_the_slower_channel_alone() -> None:
    def point(p50: float, p99: float) -> Point:
        return Point("notifier", 2, 32, 100, 4, some(p50=p50, p99=p99))

    points = {
        "buyer": point(101, 103),
        "seller": point(102, 107),
        "buyers": point(100, 131),
    }
    assert [goal.measured for goal in latency_goals(points)] == pytest.approx([1, 4, 1.31])
    assert verdicts(latency_goals(points)) == ["met", "NOT MET", "NOT MET"]


def test_the_memory_goals_take_the_last_sample_and_the_middle_one() -> None:
    samples = [Memory(20, 70, 95), Memory(40, 80, 99), Memory(60, 90, 105)]
    assert [goal.measured for goal in memory_goals(samples)] == pytest.approx([90, 1.125])


# --- the report


def test_the_main_table_is_markdown() -> None:
    rounds = {
        "bare": [some(cpu=800, rate=2000, p50=3.04, p99=10), some(cpu=1000, rate=1000)],
        "ours": [some(cpu=880.4, rate=1500), some(cpu=1000)],
    }
    shown = report.main_table(Main(rounds, {"bare": 59.4, "ours": 98.0})).splitlines()
    assert shown[0].startswith("|  | CPU µs | / bare | quartiles |")
    assert shown[1].startswith("| --- | --: | --: |")
    assert shown[2] == "| bare | 900 | 1.00 | 1.00 to 1.00 | 1500 | 1.5 | 5.0 | 59 |"
    assert shown[3].startswith("| ours | 940 | 1.05 | 1.03 to 1.08 | 750 |")
    assert {line.count("|") for line in shown} == {9}


def test_every_measured_part_is_shown_and_judged() -> None:
    assert report.PARTS.keys() == parts.PARTS.keys()


def test_the_tables_of_points_memory_and_goals_have_a_cell_for_each_column() -> None:
    point = Point("notifier", 2, 32, 100, 64, some(cpu=850, rate=640, busy=0.5, refused=3))
    shown = [
        report.points_table([("notifier", point)]),
        report.memory_table([Memory(20_000, 80.04, 95)]),
        report.goals_table([Goal("a", 1.1, 1.234), Goal("b", 0.95, None, at_least=True)]),
    ]
    for one in shown:
        assert len({line.count("|") for line in one.splitlines()}) == 1
    assert "| notifier | 2 | 32 | 100 ms | 64 | 640 |" in shown[0]
    assert shown[0].endswith("| 850 | 50 % | 3 |")
    assert shown[1].endswith("| 20000 | 80.0 | 95.0 |")
    assert "| a | at most 1.1 | 1.23 | NOT MET |" in shown[2]
    assert "| b | at least 0.95 |  | not measured |" in shown[2]


def test_the_json_has_every_figure_by_name(tmp_path: Path) -> None:
    measured: dict[str, Any] = {
        "main": Main({"bare": [some(cpu=812.3456)]}, {"bare": 59.0}),
        "memory": [Memory(20, 80.0, 95.0)],
    }
    report.write(tmp_path / "docs" / "bench.json", measured, [Goal("a", 1.1, 1.0)], "2 CPUs")
    written = json.loads((tmp_path / "docs" / "bench.json").read_text())
    assert written["machine"] == "2 CPUs"
    bare = written["main"]["bare"]
    assert (bare["figures"]["cpu"], bare["to_bare"]["median"], bare["memory"]) == (812.3, 1, 59)
    assert written["memory"] == [{"notifications": 20, "workers": 80.0, "total": 95.0}]
    assert written["goals"][0]["verdict"] == "met"
