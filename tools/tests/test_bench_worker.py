"""Tests of `make bench` with one worker: its counters, and the comparison of two checkouts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from tests.fixtures import MakeProvider
from tests.scripted_provider import answer
from tests.service import ROOT
from tests.timing import eventually
from tools import rig
from tools.bench import __main__ as command
from tools.bench import counters, parts, report, stacks, worker
from tools.bench.counters import Switches, growth, switches, system_calls
from tools.bench.figures import Figures, compared
from tools.bench.load import run_bursts
from tools.bench.plan import Bench, Plan
from tools.bench.turns import Order, Turn
from tools.bench.worker import OURS, THEIRS, Work, worker_goals
from tools.rig import CannotMeasure

STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 93.52    0.112110          15      7308           futex
  6.48    0.000018           9       120        11 recvfrom
------ ----------- ----------- --------- --------- ----------------
100.00    0.112128          15      7428        11 total
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")


def some(**fields: float) -> Figures:
    return Figures(**(dict.fromkeys(Figures._fields, 0.0) | fields))  # type: ignore[arg-type]


# --- switches


def test_growth_sums_the_new_switches_of_all_threads_that_still_run() -> None:
    before = {"1": Switches(10, 1), "2": Switches(5, 5)}
    after = {"1": Switches(13, 2), "3": Switches(4, 0)}
    assert growth(before, after) == Switches(7, 1)
    assert growth(before, {}) == Switches(0, 0)


@linux
def test_the_switches_of_all_threads_are_read() -> None:
    def wait_often() -> None:
        for _ in range(20):
            time.sleep(0.001)
        done.wait()

    done = threading.Event()
    before = switches([os.getpid()])
    thread = threading.Thread(target=wait_often)
    thread.start()
    try:
        eventually(lambda: growth(before, switches([os.getpid()])).voluntary >= 20)
        assert str(thread.native_id) in switches([os.getpid()])
    finally:
        done.set()
        thread.join()


# --- system calls


@pytest.fixture
def busy(processes: None) -> Iterator[int]:
    """The id of a process that calls getppid() repeatedly."""
    code = "import os, time\nwhile os.getppid(): time.sleep(0.0005)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_calls_are_parsed_from_the_summary_of_strace() -> None:
    assert counters._parsed(STRACE) == {"futex": 7308, "recvfrom": 120}
    assert counters._parsed("") == {}


def test_a_missing_strace_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with system_calls([os.getpid()]) as calls:
        pass
    assert (calls.by_name, calls.problem) == ({}, "strace is not installed")


def test_without_a_process_nothing_is_counted() -> None:
    with system_calls([]) as calls:
        pass
    assert (calls.by_name, calls.problem) == ({}, "")


@linux
def test_a_strace_that_exits_at_once_is_reported_without_waiting(
    busy: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tmp_path / "strace"
    refused.write_text("#!/bin/sh\nexit 1\n")
    refused.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with system_calls([busy]) as calls:
        pass
    assert (calls.by_name, calls.problem) == ({}, "strace cannot attach")


@linux
def test_calls_are_counted_during_the_block_or_the_problem_is_reported(busy: int) -> None:
    with system_calls([busy]) as calls:
        time.sleep(0.3)
    assert calls.problem or calls.by_name["getppid"] > 10
    eventually(lambda: psutil.Process(busy).status() == psutil.STATUS_SLEEPING)


# --- bursts


def test_bursts_take_turns_over_kept_connections(make_provider: MakeProvider) -> None:
    providers = [make_provider(answer()) for _ in range(2)]
    orders = [Order(one.port, "/", callers=3, warm_up=6, count=10) for one in providers]
    bursts = run_bursts(orders, rounds=4)
    for provider, turns in zip(providers, bursts, strict=True):
        assert [turn.errors for turn in turns] == [{}] * 4
        # Two more may come together with the tenth, and three are then in flight.
        assert [10 <= len(turn.latencies) <= 15 for turn in turns] == [True] * 4
        # Only the replies of the warm-up are not counted.
        assert 6 <= len(provider.received) - sum(len(turn.latencies) for turn in turns) <= 11
        assert provider.connections == 3


def test_every_other_round_runs_the_orders_in_reverse(make_provider: MakeProvider) -> None:
    called: list[str] = []

    def recording(name: str) -> Any:
        def script(peer: Any, received: Any) -> None:
            called.append(name)
            answer()(peer, received)

        return script

    ports = [make_provider(recording(name)).port for name in "ab"]
    run_bursts([Order(port, "/", callers=1, warm_up=1, count=1) for port in ports], rounds=3)
    # A burst is two requests here: the second is in flight when the first reply arrives.
    assert "".join(called[-12:]) == "aabbbbaaaabb"


# --- the comparison


def test_the_median_ratio_has_a_confidence_interval() -> None:
    ours = [some(cpu=cpu) for cpu in range(1, 41)]
    theirs = [some(cpu=10)] * 40
    result = compared(ours, theirs)
    assert result.ratio.median == pytest.approx(2.05)
    assert result.between == (1.4, 2.7)  # the 14th from either end
    assert result.rounds == 40
    assert compared(ours[:1], theirs[:1]).between == (0.1, 0.1)


def both(ours: float, theirs: float, callers: int = 8) -> worker.Works:
    return {
        worker.Case("buyer", callers).name: {
            OURS: Work([some(cpu=ours, voluntary=2.4)], {"sendto": 2.0, "recvfrom": 3.06}),
            THEIRS: Work([some(cpu=theirs)], {}, "strace is not installed"),
        }
    }


def test_goals_are_judged_only_in_a_comparison_with_another_checkout() -> None:
    works = both(60, 100) | both(70, 100, 1)
    assert [(goal.bound, goal.verdict) for goal in worker_goals(works)] == [
        (0.65, "NOT MET"),
        (0.65, "met"),
    ]
    alone = {case: {OURS: sides[OURS]} for case, sides in works.items()}
    assert worker_goals(alone) == []
    assert "this tree / beside" not in report.works_table(alone)


def test_the_table_shows_the_counts_and_why_others_are_missing() -> None:
    first, compared_with = report.works_table(both(60, 100)).split("\n\n")
    for one in (first, compared_with):
        assert len({line.count("|") for line in one.splitlines()}) == 1
    ours, theirs = first.splitlines()[2:]
    assert ours.startswith("| buyer, 8 callers: this tree | 60 | 2.4 | 0.0 | 5.1 | recvfrom 3.1, ")
    assert "| not measured | not measured | not measured: strace is not installed |" in theirs
    assert compared_with.splitlines()[2].startswith("| buyer, 8 callers | 0.600 | 0.600 to 0.600 |")


def test_the_json_has_medians_and_calls(tmp_path: Path) -> None:
    report.write(tmp_path / "beside.json", {"worker": both(60, 100)}, [], "2 CPUs")
    sides = json.loads((tmp_path / "beside.json").read_text())["worker"]["buyer, 8 callers"]
    assert sides[OURS]["figures"]["voluntary"] == 2.4
    assert sides[OURS]["calls_but_futex"] == 5.06
    assert sides[THEIRS]["calls_but_futex"] is None
    assert sides[THEIRS]["problem"] == "strace is not installed"


def test_two_checkouts_are_measured_run_bursts(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This checkout is compared with itself."""
    monkeypatch.setattr(worker, "BOUNDS", {worker.Case("buyer", 2): 0.5})
    monkeypatch.setattr(worker, "BURST", 20)
    monkeypatch.setattr(worker, "TRACED", 20)
    with stacks.sink() as urls:
        shared = cast(Any, SimpleNamespace(env=server))
        works = worker.measure_worker(Bench(Plan(starts=1, bursts=3), shared, urls, ROOT))
    ((case, sides),) = works.items()
    assert case == "buyer, 2 callers"
    assert sides.keys() == {OURS, THEIRS}
    for work in sides.values():
        assert len(work.bursts) == 3
        assert all(one.cpu > 50 for one in work.bursts)
        assert work.problem or work.calls["sendto"] >= 1
        assert "futex" not in work.calls


def test_a_checkout_whose_database_cannot_be_migrated_is_named(
    server: dict[str, str], tmp_path: Path
) -> None:
    shared = cast(Any, SimpleNamespace(env=server))
    with pytest.raises(CannotMeasure, match=f"the database of {tmp_path} was not migrated: "):
        stacks.database(shared, [], "", tmp_path)


# --- the command


def test_a_comparison_names_both_commits(processes: None, tmp_path: Path) -> None:
    text = report.compared(tmp_path)
    assert text.startswith("this tree ")
    assert text.endswith(f", beside {tmp_path} ")  # the folder is no checkout and has no commit


def test_beside_measures_only_one_worker_and_writes_nothing_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--beside", str(ROOT)])
    arguments = command._arguments()
    assert (arguments.only, arguments.to, arguments.beside) == (["worker"], None, ROOT)
    assert "worker" in parts.PARTS
    monkeypatch.setattr(sys, "argv", ["bench", "--beside", str(tmp_path)])
    with pytest.raises(SystemExit):
        command._arguments()
    assert f"{tmp_path} has no gunicorn.conf.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (CannotMeasure("a stack has exited"), 1, "make this: a stack has exited\n"),
        (TimeoutError("too late"), 1, "make this: too late\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failure_is_printed_in_one_line(
    error: BaseException,
    code: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setenv("no_proxy", "")  # `exit_code` changes it
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert rig.exit_code("make this", fail) == code
    assert capsys.readouterr().err == printed


def test_a_burst_with_a_wrong_reply_fails_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Turn(latencies=[1.0], errors={"500": 1})
    monkeypatch.setattr("tools.bench.plan.take_turns", lambda *_: [[wrong]])
    with pytest.raises(CannotMeasure, match="'500': 1"):
        worker.checked_bursts([], 1)
