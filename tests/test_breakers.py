"""When a breaker opens and recovers, and which calls it admits, sequential and concurrent."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
from pybreaker import CircuitBreakerError

from notifier.breakers import Breaker, Breakers, Call, Policy

ENDPOINT = "mail.example.com:443"
LONG = 20.0  # seconds; only a failing test waits this long

MakeBreaker = Callable[..., Breaker]

SHIPPED = Policy(
    max_half_open=5, open_seconds=60.0, min_calls=3, failure_percent=60, window_seconds=60.0
)


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 6_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_breaker(clock: Clock) -> MakeBreaker:
    return lambda **policy: Breaker(ENDPOINT, replace(SHIPPED, **policy), clock)


@pytest.fixture
def make_half_open(make_breaker: MakeBreaker, clock: Clock) -> MakeBreaker:
    def make(**policy: Any) -> Breaker:
        breaker = make_breaker(**policy)
        make_calls(breaker, "FFF")
        clock.now += policy.get("open_seconds", 60)
        assert breaker.state == "half-open"
        return breaker

    return make


@pytest.fixture
def breaker(make_breaker: MakeBreaker) -> Breaker:
    return make_breaker()


def make_calls(breaker: Breaker, history: str) -> None:
    """Make calls one after another: S succeeds, F fails, a dot records nothing."""
    for letter in history:
        with breaker.calling() as call:
            if letter != ".":
                call.record(failed=letter == "F")


def enter(breaker: Breaker) -> tuple[ExitStack, Call]:
    """Begin a call; closing the stack ends it."""
    stack = ExitStack()
    return stack, stack.enter_context(breaker.calling())


def end(begun: tuple[ExitStack, Call], *, failed: bool) -> None:
    stack, call = begun
    call.record(failed=failed)
    stack.close()


def is_refused(breaker: Breaker) -> bool:
    try:
        with breaker.calling():
            return False
    except CircuitBreakerError:
        return True


STAYS_CLOSED = ["", "F", "FF", "FFS", "SSS", "SSF", "SSFF", "SSSFFFF", "FF.", "FF.......", "..."]
OPENS_AT_THE_LAST = ["FFF", "SFF", "FSF", "FFSF", "SSFFF", "SSSFFFFF", "FF.F", "...FFF"]


@pytest.mark.parametrize(
    ("history", "state"),
    [
        *[(history, "closed") for history in [*STAYS_CLOSED, "S" * 1000 + "FFF"]],
        *[(history, "open") for history in OPENS_AT_THE_LAST],
    ],
)
def test_a_breaker_opens_when_the_share_of_failures_reaches_the_threshold(
    history: str, state: str, breaker: Breaker
) -> None:
    make_calls(breaker, history[:-1])
    assert breaker.state == "closed"
    make_calls(breaker, history[-1:])
    assert breaker.state == state


@pytest.mark.parametrize(
    ("min_calls", "failure_percent", "history", "state"),
    [
        (1, 60, "F", "open"),
        (1, 100, "SF", "closed"),
        (2, 50, "SF", "open"),
        (2, 51, "SF", "closed"),
        (3, 100, "FFSFFFFFFF", "closed"),
        (3, 100, "FFF", "open"),
        (10, 1, "F" * 9, "closed"),
        (10, 1, "S" * 98 + "F", "open"),
        (10, 1, "S" * 100 + "F", "closed"),
        (4, 75, "SFFF", "open"),
        (4, 76, "SFFF", "closed"),
    ],
)
def test_the_policy_sets_the_threshold_and_the_minimum_number_of_calls(
    min_calls: int, failure_percent: int, history: str, state: str, make_breaker: MakeBreaker
) -> None:
    breaker = make_breaker(min_calls=min_calls, failure_percent=failure_percent)
    make_calls(breaker, history)
    assert breaker.state == state


@pytest.mark.parametrize(
    ("calls", "state"),
    [
        ([(0, "S" * 1000), (61, "FFF")], "open"),
        ([(0, "S" * 1000), (30, "FFF")], "closed"),
        ([(0, "FF"), (61, "F")], "closed"),
        ([(0, "F"), (30, "F"), (53, "F")], "open"),
        ([(0, "F"), (30, "F"), (61, "F")], "closed"),
        ([(0, "F"), (30, "F"), (61, "F"), (62, "F")], "open"),
        ([(0, "SSS"), (50, "FF"), (70, "F")], "open"),
        ([(10 * n, "F") for n in range(3)], "open"),
        ([(59 * n, "F") for n in range(3)], "closed"),
        ([(61 * n, "FF") for n in range(20)], "closed"),
        ([(0, "FF"), (86_400, "FF")], "closed"),
    ],
)
def test_only_calls_within_the_window_count(
    calls: list[tuple[float, str]], state: str, breaker: Breaker, clock: Clock
) -> None:
    start = clock.now
    for when, history in calls:
        clock.now = start + when
        make_calls(breaker, history)
    assert breaker.state == state


def test_the_policy_sets_the_length_of_the_window(make_breaker: MakeBreaker, clock: Clock) -> None:
    breaker = make_breaker(window_seconds=1.0)
    make_calls(breaker, "FF")
    clock.now += 1.1
    make_calls(breaker, "F")
    assert breaker.state == "closed"


def test_only_completed_calls_count(breaker: Breaker) -> None:
    under_way = [enter(breaker) for _ in range(10)]
    make_calls(breaker, "FFF")
    assert breaker.state == "open"
    for call in under_way:
        end(call, failed=False)
    assert breaker.state == "open"


def test_an_open_breaker_admits_no_call_until_its_open_time_has_passed(
    breaker: Breaker, clock: Clock
) -> None:
    make_calls(breaker, "FFF")
    for seconds in (0.0, 30.0, 29.9):
        clock.now += seconds
        assert is_refused(breaker)
    clock.now += 0.1
    assert not is_refused(breaker)


def test_an_open_breaker_becomes_half_open_without_traffic(breaker: Breaker, clock: Clock) -> None:
    make_calls(breaker, "FFF")
    clock.now += 59.9
    assert breaker.state == "open"
    clock.now += 0.1
    assert breaker.state == "half-open"
    clock.now += 86_400
    assert breaker.state == "half-open"


def test_calls_in_flight_and_successes_both_count_towards_the_half_open_limit(
    make_half_open: MakeBreaker,
) -> None:
    breaker = make_half_open(max_half_open=3)
    make_calls(breaker, "S")
    probes = [enter(breaker), enter(breaker)]
    assert is_refused(breaker)
    end(probes.pop(), failed=False)
    assert is_refused(breaker)
    assert breaker.state == "half-open"
    end(probes.pop(), failed=False)
    assert breaker.state == "closed"


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_half_open_breaker_closes_after_as_many_successes_as_its_limit(
    limit: int, make_half_open: MakeBreaker
) -> None:
    breaker = make_half_open(max_half_open=limit)
    make_calls(breaker, "S" * (limit - 1))
    assert breaker.state == "half-open"
    make_calls(breaker, "S")
    assert breaker.state == "closed"


@pytest.mark.parametrize("history", ["F", "SF", "SSSSF", ".F", "S.F"])
def test_the_first_failed_probe_reopens_it_for_the_full_open_time(
    history: str, breaker: Breaker, clock: Clock
) -> None:
    make_calls(breaker, "FFF")
    clock.now += 100
    make_calls(breaker, history)
    assert breaker.state == "open"
    assert is_refused(breaker)
    clock.now += 59.9
    assert breaker.state == "open"
    clock.now += 0.1
    assert breaker.state == "half-open"


def test_the_successes_of_one_half_open_period_do_not_count_in_the_next(
    make_half_open: MakeBreaker, clock: Clock
) -> None:
    breaker = make_half_open(max_half_open=2)
    make_calls(breaker, "SF")
    clock.now += 60
    make_calls(breaker, "S")
    assert breaker.state == "half-open"
    make_calls(breaker, "S")
    assert breaker.state == "closed"


def test_closing_clears_the_window(make_half_open: MakeBreaker) -> None:
    breaker = make_half_open(open_seconds=1.0, max_half_open=1)
    make_calls(breaker, "SFF")
    assert breaker.state == "closed"
    make_calls(breaker, "F")
    assert breaker.state == "open"


@pytest.mark.parametrize(
    "error",
    [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, CircuitBreakerError],
)
def test_a_slot_is_released_whatever_the_block_raises(
    error: type[BaseException], make_half_open: MakeBreaker
) -> None:
    breaker = make_half_open(max_half_open=1)
    for _ in range(3):
        with pytest.raises(error), breaker.calling():
            raise error
        assert breaker.state == "half-open"
    make_calls(breaker, "S")
    assert breaker.state == "closed"


def test_a_result_recorded_before_the_block_raises_counts(breaker: Breaker) -> None:
    def fail() -> None:
        with breaker.calling() as call:
            call.record(failed=True)
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert breaker.state == "open"


def test_a_call_that_records_nothing_releases_its_slot(make_half_open: MakeBreaker) -> None:
    breaker = make_half_open(max_half_open=2)
    make_calls(breaker, "....S...")
    assert breaker.state == "half-open"
    with breaker.calling():
        assert is_refused(breaker)
    make_calls(breaker, "S")
    assert breaker.state == "closed"


@pytest.mark.parametrize("failed", [True, False])
def test_a_call_admitted_while_closed_changes_nothing_once_the_breaker_is_open(
    failed: bool, breaker: Breaker, clock: Clock
) -> None:
    late = enter(breaker)
    make_calls(breaker, "FFF")
    clock.now += 30
    end(late, failed=failed)
    assert breaker.state == "open"
    clock.now += 30
    assert breaker.state == "half-open"


@pytest.mark.parametrize("failed", [True, False])
def test_a_call_admitted_while_closed_changes_nothing_once_the_breaker_is_half_open(
    failed: bool, make_breaker: MakeBreaker, clock: Clock
) -> None:
    breaker = make_breaker(max_half_open=1)
    late, silent = enter(breaker), enter(breaker)
    make_calls(breaker, "FFF")
    clock.now += 60
    probe = enter(breaker)
    end(late, failed=failed)
    silent[0].close()
    assert breaker.state == "half-open"
    assert is_refused(breaker)  # neither call released a slot that it did not hold
    end(probe, failed=False)
    assert breaker.state == "closed"


@pytest.mark.parametrize("failed", [True, False])
def test_a_probe_of_an_earlier_half_open_period_changes_nothing_in_the_next(
    failed: bool, make_half_open: MakeBreaker, clock: Clock
) -> None:
    breaker = make_half_open(max_half_open=2)
    late = enter(breaker)
    make_calls(breaker, "F")
    clock.now += 60
    probes = [enter(breaker), enter(breaker)]
    end(late, failed=failed)
    assert breaker.state == "half-open"
    assert is_refused(breaker)
    for probe in probes:
        end(probe, failed=False)
    assert breaker.state == "closed"


def test_a_call_admitted_before_opening_does_not_count_after_closing_again(
    make_breaker: MakeBreaker, clock: Clock
) -> None:
    breaker = make_breaker(max_half_open=1)
    late = [enter(breaker) for _ in range(5)]
    make_calls(breaker, "FFF")
    clock.now += 60
    make_calls(breaker, "SFF")
    for call in late:
        end(call, failed=True)
    assert breaker.state == "closed"
    make_calls(breaker, "F")
    assert breaker.state == "open"


def changes(caplog: pytest.LogCaptureFixture) -> list[tuple[Any, ...]]:
    return [
        tuple(record.__dict__[name] for name in ("levelname", "host", "from_state", "to_state"))
        for record in caplog.records
    ]


OPENED = ("WARNING", ENDPOINT, "closed", "open")
PROBED = ("INFO", ENDPOINT, "open", "half-open")
OPENED_AGAIN = ("WARNING", ENDPOINT, "half-open", "open")
CLOSED = ("INFO", ENDPOINT, "half-open", "closed")


def test_each_change_of_state_is_logged_once_with_its_endpoint(
    make_breaker: MakeBreaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    breaker = make_breaker(max_half_open=2)
    make_calls(breaker, "SFF")
    clock.now += 60
    make_calls(breaker, "SF")
    clock.now += 60
    make_calls(breaker, "SSSSS")
    assert changes(caplog) == [OPENED, PROBED, OPENED_AGAIN, PROBED, CLOSED]


def test_half_open_is_logged_when_a_probe_is_admitted_not_when_the_state_is_read(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_calls(breaker, "FFF")
    assert is_refused(breaker)
    clock.now += 60
    assert breaker.state == "half-open"
    assert changes(caplog) == [OPENED]
    with breaker.calling():
        assert changes(caplog) == [OPENED, PROBED]


def test_the_lock_is_held_while_the_state_is_read_or_changed_but_not_while_logging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    at_clock, at_log = [], []
    caplog.set_level(logging.INFO)
    # append() returns None, so the first lambda returns the time and the second returns True.
    clock = lambda: at_clock.append(breaker._lock.locked()) or 6_000.0  # noqa: E731
    watch = lambda _: at_log.append(breaker._lock.locked()) is None  # noqa: E731
    breaker = Breaker(ENDPOINT, replace(SHIPPED, open_seconds=0.0), clock)
    caplog.handler.addFilter(watch)
    make_calls(breaker, "FFFSSSSS")  # the clock is read to count, to open and to admit a probe
    caplog.handler.removeFilter(watch)
    assert set(at_clock) == {True}
    assert at_log == [False, False, False]


def test_calls_to_one_endpoint_run_concurrently(breaker: Breaker) -> None:
    together = threading.Barrier(32)

    def call(_: int) -> None:
        with breaker.calling() as call:
            together.wait(LONG)  # fails unless all 32 calls are inside
            call.record(failed=False)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(call, range(32)))
    assert breaker.state == "closed"


def test_a_half_open_breaker_admits_only_its_limit_of_concurrent_calls(
    make_half_open: MakeBreaker,
) -> None:
    breaker = make_half_open(max_half_open=5)
    start, all_have_tried = threading.Barrier(40), threading.Barrier(40)

    def call(_: int) -> bool:
        start.wait(LONG)
        try:
            with breaker.calling() as call:
                all_have_tried.wait(LONG)
                call.record(failed=False)
        except CircuitBreakerError:
            all_have_tried.wait(LONG)
            return False
        return True

    with ThreadPoolExecutor(40) as pool:
        admitted = list(pool.map(call, range(40)))
    assert admitted.count(True) == 5
    assert breaker.state == "closed"


def test_a_half_open_breaker_never_has_more_calls_in_flight_than_its_limit(
    make_half_open: MakeBreaker,
) -> None:
    breaker = make_half_open(max_half_open=3)
    start, slots = threading.Barrier(16), threading.Semaphore(3)

    def call_repeatedly(_: int) -> int:
        start.wait(LONG)
        return sum(call_once() for _ in range(200))

    def call_once() -> bool:
        try:
            with breaker.calling():
                assert slots.acquire(blocking=False)  # a fourth call would find no slot
                time.sleep(0)  # let other threads run
                slots.release()
        except CircuitBreakerError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(call_repeatedly, range(16))) >= 3
    make_calls(breaker, "SSS")  # every slot has been released
    assert breaker.state == "closed"


def test_a_new_endpoint_gets_one_breaker_even_if_two_threads_ask_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = threading.Barrier(2)

    class Slow(Breaker):
        def __init__(self, *args: Any) -> None:
            with suppress(threading.BrokenBarrierError):  # only one breaker is made
                together.wait(1)
            super().__init__(*args)

    monkeypatch.setattr("notifier.breakers.Breaker", Slow)
    breakers = Breakers(SHIPPED)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(breakers.of, [ENDPOINT, ENDPOINT])
    assert first is second is breakers.of(ENDPOINT)


def test_each_endpoint_has_its_own_breaker() -> None:
    breakers = Breakers(SHIPPED)
    make_calls(breakers.of("a:443"), "FFF")
    assert breakers.of("a:443").state == "open"
    assert breakers.of("a:80").state == "closed"
    assert breakers.of("b:443").state == "closed"
