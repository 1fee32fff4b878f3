"""`make pressure`: small real runs of each kind of pressure, and the table."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.fixtures import MakeProvider
from tests.scripted_provider import answer
from tests.service import ROOT
from tools import rig
from tools.bench import stacks
from tools.dev import postgres
from tools.pressure import __main__ as command
from tools.pressure import callers, cost, machine
from tools.pressure.greedy import burst, greedy
from tools.pressure.stand import Answer, Row, Scenario, Stand, all_ok, none
from tools.rig import CannotMeasure

# --- small real runs

SMALL: dict[Any, dict[str, Any]] = {
    callers: {
        "SILENT": 300,
        "SILENT_WORKERS": 1,
        "ROUNDS": 2,
        "HALF": 150,
        "OTHERS": 5,
        "HALF_WORKERS": 1,
        "GREEDY": 8,
        "GREEDY_WORKERS": 1,
        "ALONE": 5,
        "BESIDE": 5,
        "INTERIM": 3,
    },
    machine: {
        "SELLERS": 4,
        "MEMORY_WORKERS": 1,
        "IN_TURN": 3,
        "LOGGED": 1000,  # a pipe has room for about 200 lines
        "LOG_WORKERS": 1,
        "OUTAGE_WORKERS": 1,
        "UNDER_LOAD": 0.5,
    },
}


@pytest.fixture(scope="module")
def stand(processes: None) -> Iterator[Stand]:
    """This checkout, with a server that a scenario may stop."""
    server = postgres.acquire(ephemeral=True)
    try:
        with stacks.sink() as urls:
            yield Stand(ROOT, server, urls)
    finally:
        server.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in SMALL.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("no_proxy", "*")


@pytest.mark.alone
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "scenario",
    [
        callers.silent,
        callers.half_bodies,
        callers.expect,
        machine.descriptors_256,
        machine.full_memory,
        machine.stalled_log,
        machine.outage,
    ],
)
def test_the_service_meets_the_goals_of_a_small(
    scenario: Callable[[Stand], Iterator[Row]], stand: Stand
) -> None:
    rows = [*scenario(stand)]
    assert rows
    assert [row for row in rows if row.met is False] == []


@pytest.mark.alone
@pytest.mark.usefixtures("small")
def test_a_polite_caller_is_measured_alone_and_beside_greedy_ones(stand: Stand) -> None:
    rows = {row.measured: row for row in callers.greedy_slow(stand)}
    assert rows["a polite caller alone"].figure.endswith("5 of 5 are 200")
    assert float(rows["its p50 beside / alone"].figure) > 0
    assert "200: " in rows["replies to the greedy callers a second"].figure


def test_the_cpu_of_single_steps_is_measured(processes: None) -> None:
    here = cast(Any, argparse.Namespace(checkout=ROOT))
    for row in [*cost.log_line(here), *cost.address(here)]:
        assert 1 < float(row.figure.removesuffix(" µs")) < 2000


def test_a_step_that_a_checkout_lacks_is_reported(processes: None, tmp_path: Any) -> None:
    there = cast(Any, argparse.Namespace(checkout=tmp_path))
    with pytest.raises(CannotMeasure, match="No module named 'notifier'"):
        [*cost.address(there)]


# --- greedy callers


@pytest.mark.usefixtures("processes")
def test_a_burst_sends_each_notification_once(make_provider: MakeProvider) -> None:
    service = make_provider(answer())
    harvest = burst(service.port, callers=3, most=20, seconds=20.0)
    assert harvest.statuses == {"200": 20}
    assert len(service.received) == 20
    assert service.connections == 3
    assert 0 < harvest.slowest <= harvest.seconds


@pytest.mark.usefixtures("processes")
def test_greedy_callers_reconnect_and_call_until_the_end_of_the_block(
    make_provider: MakeProvider,
) -> None:
    service = make_provider(answer(503, b"{}", "Connection: close"))
    with greedy(service.port, callers=2) as harvests:
        rig.wait_until(lambda: len(service.received) > 10)
        assert harvests == []
    (harvest,) = harvests
    assert harvest.statuses["503"] > 8
    assert "503: " in harvest.text()


# --- rows


def test_late_answers_do_not_count_as_good() -> None:
    answers = [Answer(200, 0.1), Answer(200, 1.2), Answer(0, 5.0)]
    row = all_ok("probes", answers, within=1.0)
    figure = "1; 200: 2, no answer: 1; the slowest 5000 ms"
    assert row == Row("probes: 200 within 1 s", "3", figure, met=False)
    assert all_ok("probes", answers[:2]).met
    assert [none("deaths", count).met for count in (0, 1)] == [True, False]


# --- the table


def shown(monkeypatch: pytest.MonkeyPatch, *measured: Any) -> tuple[bool, Scenario, list[Stand]]:
    """Return a scenario whose stands give these rows, or raise these errors."""
    rows = iter(measured)

    def measure(_: Stand) -> Iterator[Row]:
        found = next(rows)
        if isinstance(found, Exception):
            raise found
        yield from found

    return Scenario("pressure", measure), [cast(Any, None)] * len(measured)


@pytest.mark.parametrize(
    ("measured", "lines", "missed"),
    [
        (
            ([Row("good", "10", "10", met=True)],),
            ["| pressure | good | 10 | 10 |"],
            False,
        ),
        (
            ([Row("good", "10", "0", met=False)], [Row("good", "10", "10", met=True)]),
            ["| pressure | good | 10 | 0, NOT MET | 10 |"],
            False,
        ),
        (
            ([Row("good", "10", "10", met=True)], [Row("good", "10", "9", met=False)]),
            ["| pressure | good | 10 | 10 | 9, NOT MET |"],
            True,
        ),
        (
            (CannotMeasure("it has exited"), [Row("good", "10", "10", met=True)]),
            [
                "| pressure | not measured |  | it has exited, NOT MET |  |",
                "| pressure | good | 10 |  | 10 |",
            ],
            False,
        ),
        (
            ([Row("good", "10", "10", met=True)], TimeoutError("too late")),
            [
                "| pressure | good | 10 | 10 |  |",
                "| pressure | not measured |  |  | too late, NOT MET |",
            ],
            True,
        ),
    ],
)
def test_the_table_shows_both_checkouts_and_judges_this_one(
    measured: Any,
    lines: list[str],
    missed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command._run(*shown(monkeypatch, *measured)) == missed
    assert capsys.readouterr().out.splitlines() == lines


def test_one_scenario_runs_beside_another_checkout(
    processes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This checkout is compared with itself."""
    arguments = ["pressure", "--beside", str(ROOT), "--only", "address"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setenv("no_proxy", "")  # the command changes it
    assert command.main() == 0
    machine_line, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert " CPUs, " in machine_line
    assert head == "| pressure | measured | goal | beside | this tree |"
    assert [row.count(" µs") for row in rows] == [2, 2]
