"""A small chaos, and tests that each invariant detects its violations."""

import json
import socket
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from notifier.models import Channel
from tests.timing import eventually
from tools.chaos import __main__ as command
from tools.chaos import invariants
from tools.chaos.evidence import (
    ADMITTED,
    CHANGED,
    FAILED,
    SKIPPED,
    Absence,
    Delivery,
    Evidence,
    Limits,
    Line,
    Period,
    Reply,
    Size,
    read_logs,
)
from tools.chaos.providers import ACCEPTS, BEHAVIOURS, LATE, OK, Provider
from tools.chaos.report import report
from tools.chaos.schedule import EVERYTHING, Kinds, plan
from tools.chaos.stage import run

SEED = 2830
SMALL = Kinds(
    processes=("kill a worker",),
    database=("PostgreSQL killed", "replace a URL"),
    providers=("answers 503", "hangs", "drips its status", "resets"),
)


@pytest.fixture(scope="module")
def seen(processes: None) -> Evidence:
    return run(SEED, 8.0, SMALL, warm_up=1.5, calm=2.0)


@pytest.mark.alone
@pytest.mark.parametrize("name", invariants.INVARIANTS)
def test_a_small_chaos_keeps_the_invariant(name: str, seen: Evidence) -> None:
    assert [*invariants.INVARIANTS[name](seen)] == [], report(seen, invariants.check(seen))


# --- each invariant detects its violations


def reply(request_id: str, status: int, began: float, recipient: str = "buyer") -> Reply:
    """Return a reply as it should be."""
    code = {500: "E102", 503: "E106"}.get(status, "")
    body = {"error": {"code": code, "message": "a text"}} if code else {"message": "sent"}
    headers = {"X-Request-Id": request_id, "Retry-After": "1"}
    return Reply(request_id, recipient, began, 0.5, status, body, headers)


def email(request_id: str, host: str, at: float, behaviour: str = ACCEPTS) -> Delivery:
    return Delivery("Email", host, request_id, at, behaviour, behaviour == ACCEPTS)


def admits(request_id: str, host: str, at: float, worker: str = "worker-1") -> Line:
    return Line(worker, at, ADMITTED, request_id, host)


def fails(request_id: str, host: str, at: float, reason: str) -> Line:
    return Line("worker-1", at, FAILED, request_id, host, reason)


def refuses(request_id: str, host: str, at: float, times: int = 1) -> Line:
    return Line("worker-1", at, SKIPPED, request_id, host, "open", times=times)


def opens(host: str, at: float, worker: str = "worker-1") -> Line:
    return Line(worker, at, CHANGED, None, host, to_state="open")


CALM = Size(workers=3, threads=10, files=30, to_providers=4, memory=40_000_000)
PUSH = Delivery("PushNotification", "push:1", "b", 20.0, ACCEPTS, True)
KILL = 25.0
ABSENT = Absence("mail:2", 40.0, 41.0)
SOUND = Evidence(
    limits=Limits(1.8, 1.0, 2.0, 2, 4, 2, frozenset({"kill a worker", "hangs"}), 4),
    replies=[
        reply("a", 200, 1.0),
        reply("b", 200, 20.0, "seller"),
        Reply("c", "buyer", 24.0, 1.1, 0, cut=True),
        reply("d", 500, 30.0),
        reply("e", 503, 31.0),
        reply("f", 200, 101.0),
    ],
    deliveries=[
        email("a", "mail:1", 1.0),
        email("b", "mail:1", 20.0, "hangs"),
        email("b", "mail:2", 20.6),
        PUSH,
        email("c", "mail:1", 24.0),
        email("d", "mail:1", 30.0, "hangs"),
        email("f", "mail:2", 101.0),
    ],
    lines=[
        admits("a", "mail:1", 1.0),
        admits("b", "push:1", 20.0),
        admits("b", "mail:1", 20.0),
        fails("b", "mail:1", 20.6, "timeout"),
        admits("b", "mail:2", 20.6),
        admits("c", "mail:1", 24.0),
        admits("d", "mail:1", 30.0),
        opens("mail:1", 30.5),
        refuses("x", "mail:1", 31.0),
        admits("f", "mail:2", 101.0),
    ],
    absences=[ABSENT],
    kills=[KILL],
    faults=Counter({"kill a worker": 1}),
    before=Period(0.0, 10.0, CALM),
    after=Period(100.0, 110.0, CALM),
)


def with_reply(number: int, **changes: Any) -> Evidence:
    replies = [*SOUND.replies]
    replies[number] = replies[number]._replace(**changes)
    return replace(SOUND, replies=replies)


def with_delivery(delivery: Delivery, *lines: Line) -> Evidence:
    deliveries = [*SOUND.deliveries, delivery]
    return replace(SOUND, deliveries=deliveries, lines=[*SOUND.lines, *lines])


def sent(host: str, at: float, opened: float, worker: str = "worker-1") -> Evidence:
    """Add a delivery to `host`, and a breaker of the first worker that opened."""
    lines = [opens(host, opened), admits("z", host, at, worker)]
    return with_delivery(email("z", host, at, "resets"), *lines)


def afterwards(**changes: int) -> Evidence:
    return replace(SOUND, after=SOUND.after._replace(size=CALM._replace(**changes)))


BROKEN = {
    "a 200 that no provider accepted": (
        "replies_match_deliveries",
        replace(SOUND, deliveries=SOUND.deliveries[1:]),
    ),
    "a seller's 200 without a push": (
        "replies_match_deliveries",
        replace(SOUND, deliveries=[one for one in SOUND.deliveries if one != PUSH]),
    ),
    "a second provider that accepted": (
        "replies_match_deliveries",
        with_delivery(email("a", "mail:2", 1.1), admits("a", "mail:2", 1.1)),
    ),
    "an error although all accepted": (
        "replies_match_deliveries",
        with_delivery(email("d", "mail:2", 30.1), admits("d", "mail:2", 30.1)),
    ),
    "no answer": ("replied_in_time", with_reply(3, status=0)),
    "an error after the deadline": ("replied_in_time", with_reply(3, seconds=2.9)),
    "an error in HTML": ("replied_in_time", with_reply(3, body=None)),
    "another code": ("replied_in_time", with_reply(3, body=reply("", 503, 0).body)),
    "an envelope with another field": (
        "replied_in_time",
        with_reply(3, body={**reply("", 500, 0).body, "detail": "a host"}),
    ),
    "an undocumented status": ("replied_in_time", with_reply(3, status=502)),
    "a 503 without Retry-After": ("replied_in_time", with_reply(4, headers={"X-Request-Id": "e"})),
    "another request's reply": ("replied_in_time", with_reply(0, headers={"X-Request-Id": "b"})),
    "a cut without a kill": ("only_kills_cut", replace(SOUND, kills=[KILL + 1])),
    "a cut long after the kill": ("only_kills_cut", replace(SOUND, kills=[KILL - 3])),
    "more cuts than threads": (
        "only_kills_cut",
        replace(SOUND, replies=[*SOUND.replies, *[SOUND.replies[2]] * 2]),
    ),
    "a delivery past an open breaker": (
        "open_breakers_refuse",
        sent("mail:1", 51.0, opened=50.0),
    ),
    "a delivery past a breaker that opened before its row was removed": (
        "open_breakers_refuse",
        sent("mail:2", 39.5, opened=39.0),
    ),
    "a delivery past a breaker that opened after its row was added again": (
        "open_breakers_refuse",
        sent("mail:2", 43.0, opened=42.0),
    ),
    "a delivery that no breaker admitted": (
        "open_breakers_refuse",
        with_delivery(email("z", "mail:1", 50.0)),
    ),
    "a delivery before a breaker admitted it": (
        "open_breakers_refuse",
        with_delivery(email("z", "mail:1", 50.0), admits("z", "mail:1", 51.0)),
    ),
    "the same notification twice": ("delivered_once", with_delivery(SOUND.deliveries[1])),
    "more threads": ("nothing_leaks", afterwards(threads=19)),
    "more files": ("nothing_leaks", afterwards(files=35)),
    "more connections": ("nothing_leaks", afterwards(to_providers=5)),
    "more memory": ("nothing_leaks", afterwards(memory=60_000_001)),
    "more workers": ("nothing_leaks", afterwards(workers=4)),
    "fewer workers": ("nothing_leaks", afterwards(workers=2)),
    "an error before the chaos": ("calm_delivers_everything", with_reply(0, status=500)),
    "an error after the chaos": ("calm_delivers_everything", with_reply(5, status=500)),
    "no requests after the chaos": (
        "calm_delivers_everything",
        replace(SOUND, replies=SOUND.replies[:5]),
    ),
    "a fault that never happened": ("everything_happened", replace(SOUND, faults=Counter())),
    "a behaviour that no request met": (
        "everything_happened",
        replace(SOUND, deliveries=[one for one in SOUND.deliveries if one.accepted]),
    ),
    "too few requests": ("everything_happened", replace(SOUND, replies=SOUND.replies[:3])),
    "no fallback": ("everything_happened", replace(SOUND, lines=SOUND.lines[7:])),
    "no breaker opened": (
        "everything_happened",
        replace(SOUND, lines=[one for one in SOUND.lines if one.message != CHANGED]),
    ),
    "no attempt refused": ("everything_happened", replace(SOUND, lines=SOUND.lines[:8])),
}


def test_sound_evidence_violates_nothing() -> None:
    assert invariants.check(SOUND) == {name: [] for name in invariants.INVARIANTS}


@pytest.mark.parametrize("violation", BROKEN)
def test_an_invariant_detects(violation: str) -> None:
    name, broken = BROKEN[violation]
    invariant = getattr(invariants, name)
    assert invariant in invariants.INVARIANTS.values()
    assert len([*invariant(broken)]) == 1


@pytest.mark.parametrize(
    "allowed",
    [
        sent("mail:1", 52.1, opened=50.0),  # after the open state's time-out
        sent("mail:1", 50.1, opened=50.0),  # admitted before the opening, but logged after it
        sent("mail:1", 51.0, opened=50.0, worker="worker-2"),  # another worker's breaker
        sent("mail:2", 40.5, opened=39.0),  # the breaker was removed with its row
        sent("mail:2", 41.5, opened=40.5),
    ],
)
def test_a_delivery_that_an_opened_breaker_may_admit_is_no_violation(allowed: Evidence) -> None:
    assert [*invariants.open_breakers_refuse(allowed)] == []


def test_a_killed_worker_may_lose_the_line_about_an_admitted_attempt() -> None:
    lost = with_delivery(email("z", "mail:1", KILL - 0.1))
    assert [*invariants.open_breakers_refuse(lost)] == []


def test_an_acceptance_after_the_attempt_timed_out_does_not_count() -> None:
    late = fails("b", "mail:1", 20.6, "timeout")
    assert late in SOUND.lines
    deliveries = [one._replace(accepted=True) for one in SOUND.deliveries]
    assert Counter(one.channel for one in deliveries if one.request_id == "b")["Email"] == 2
    evidence = replace(SOUND, deliveries=deliveries, replies=SOUND.replies[:3])
    assert [*invariants.replies_match_deliveries(evidence)] == []


# --- the schedule


def test_the_same_seed_makes_the_same_schedule_and_another_seed_a_different_one() -> None:
    first, again, other = (plan(seed, 60.0, 2, EVERYTHING) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_has_every_kind_within_its_time_and_no_overlap_in_a_track(seed: int) -> None:
    schedule = plan(seed, 150.0, 8, EVERYTHING)
    tracks = [schedule.processes, schedule.database, *schedule.providers]
    assert {fault.kind for track in tracks for fault in track} == EVERYTHING.all()
    for track in tracks:
        times = [time for fault in track for time in (fault.at, fault.at + fault.seconds)]
        assert times == sorted(times)
        assert times[-1] <= 150.0


# --- the providers

REQUEST = b"POST /send HTTP/1.1\r\nX-Request-Id: a\r\nContent-Length: 2\r\n\r\n{}"
NEVER_ACCEPT = {"answers 503", "hangs", "drips its status", "resets"}


@pytest.mark.parametrize("behaviour", sorted(BEHAVIOURS.keys() - {"flaps"}))
def test_a_provider_records_whether_it_sent_a_2xx_status_line(behaviour: str) -> None:
    deliveries: list[Delivery] = []
    provider = Provider(Channel.EMAIL, deliveries)
    provider.behaviour = behaviour
    try:
        with caller(provider) as sock:
            sock.sendall(REQUEST)
            accepted = OK in answered(sock)
        eventually(lambda: deliveries)
    finally:
        provider.stop()
    assert accepted == (behaviour not in NEVER_ACCEPT)
    (delivery,) = deliveries
    recorded = Delivery(Channel.EMAIL, provider.host, "a", delivery.received, behaviour, accepted)
    assert delivery == recorded


def test_a_flapping_provider_accepts_and_refuses() -> None:
    deliveries: list[Delivery] = []
    provider = Provider(Channel.EMAIL, deliveries)
    provider.behaviour = "flaps"
    try:
        with caller(provider) as sock:
            answers = set()
            while len(answers) < 2 and len(deliveries) < 100_000:
                sock.sendall(REQUEST)
                answers.add(sock.recv(1000))
    finally:
        provider.stop()
    assert {OK in answer for answer in answers} == {True, False}
    assert {delivery.accepted for delivery in deliveries} == {True, False}


def test_a_provider_does_not_record_an_incomplete_request() -> None:
    deliveries: list[Delivery] = []
    provider = Provider(Channel.EMAIL, deliveries)
    try:
        with caller(provider) as sock:
            sock.sendall(REQUEST + REQUEST[:-1])
            assert OK in answered(sock)
    finally:
        provider.stop()
    assert len(deliveries) == 1


def caller(provider: Provider) -> socket.socket:
    host, _, port = provider.host.partition(":")
    return socket.create_connection((host, int(port)), timeout=LATE + 0.7)


def answered(sock: socket.socket) -> bytes:
    """Return the data up to the end of a line or of the connection, or up to a time-out."""
    answer = b""
    with suppress(OSError):
        while b"\n" not in answer and len(answer) < 30 and (data := sock.recv(1000)):
            answer += data
    return answer


# --- the logs and the report


def test_the_incomplete_last_line_of_a_killed_workers_log_is_ignored(tmp_path: Path) -> None:
    line = {"timestamp": "1970-01-01T00:00:01.500Z", "message": ADMITTED}
    text = json.dumps(line | {"request_id": "a", "host": "mail:1", "app": "notifier"})
    other = json.dumps(line | {"message": "something else"})
    (tmp_path / "worker-7.log").write_text(f"{text}\n{other}\n{text}")
    (tmp_path / "master.log").write_text(f"{text}\n")
    assert read_logs(tmp_path) == [Line("worker-7", 1.5, ADMITTED, "a", "mail:1")]


def test_a_line_about_refusals_counts_all_of_them_and_no_fallback() -> None:
    with_refusals = replace(SOUND, lines=[*SOUND.lines, refuses("a", "mail:1", 2.0, times=4)])
    assert with_refusals.refusals() == SOUND.refusals() + 4
    assert with_refusals.fallbacks() == SOUND.fallbacks()


def test_the_report_has_all_records_of_a_violation() -> None:
    broken = with_delivery(SOUND.deliveries[1])
    text = report(broken, invariants.check(broken))
    assert "| nothing is delivered twice through the same provider | 1 |" in text
    assert text.count(str(SOUND.deliveries[1])) == 2
    assert str(SOUND.replies[1]) in text
    assert str(SOUND.lines[1]) in text


@pytest.mark.parametrize(
    ("evidence", "code"), [(SOUND, 0), (with_delivery(SOUND.deliveries[1]), 1)]
)
def test_the_exit_code_says_whether_an_invariant_was_violated(
    evidence: Evidence,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "")  # the command changes it
    monkeypatch.setattr(sys, "argv", ["chaos", "--seed", "3", "--seconds", "9"])
    monkeypatch.setattr(command, "run", lambda seed, seconds: {(3, 9.0): evidence}[seed, seconds])
    assert command.main() == code
    assert capsys.readouterr().out.startswith("python -m tools.chaos --seed 3 --seconds 9\n")
