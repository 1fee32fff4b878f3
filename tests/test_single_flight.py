"""SingleFlight: work that several threads request at once is done once."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from notifier.single_flight import SingleFlight

CALLERS = 10
LONG = 20.0  # seconds; only a failing test waits this long

caller: ContextVar[str] = ContextVar("caller", default="nobody")


class CountedKey:
    """A key that sets `all_asked` once `callers` threads have looked up its run.

    The look-up happens under the lock, so a thread that has made it has joined the run.
    """

    def __init__(self, callers: int) -> None:
        self._callers = callers
        self._threads: set[int] = set()
        self.all_asked = threading.Event()

    def __hash__(self) -> int:
        self._threads.add(threading.get_ident())
        if len(self._threads) >= self._callers:
            self.all_asked.set()
        return 0


class Work:
    """Work that counts its runs; each run waits for `release` and then returns `end()`."""

    def __init__(self, end: Callable[[], Any] = lambda: "a result") -> None:
        self.end = end
        self.runs = 0
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self) -> Any:
        self.runs += 1
        self.begun.set()
        assert self.release.wait(LONG)
        return self.end()


@pytest.fixture
def flights() -> SingleFlight[Any, Any]:
    return SingleFlight("a-flight")


def at_once(act: Callable[[], Any], key: CountedKey, work: Work) -> list["Future[Any]"]:
    """Run `act` in all callers; release `work` once the last caller has joined."""
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = [pool.submit(act) for _ in range(CALLERS)]
        asked = key.all_asked.wait(LONG)
        work.release.set()
    assert asked
    return futures


def test_ten_callers_at_once_make_one_run_and_share_its_result(
    flights: SingleFlight[Any, Any],
) -> None:
    work, key, result = Work(), CountedKey(CALLERS), object()
    work.end = lambda: result
    futures = at_once(lambda: flights.run(key, work, LONG), key, work)
    assert all(future.result() is result for future in futures)
    assert work.runs == 1


def test_an_error_reaches_all_callers(flights: SingleFlight[Any, Any]) -> None:
    def fail() -> None:
        raise LookupError("no such name")

    work, key = Work(fail), CountedKey(CALLERS)
    futures = at_once(lambda: flights.run(key, work, LONG), key, work)
    for future in futures:
        with pytest.raises(LookupError, match="no such name"):
            future.result()
    assert work.runs == 1


def test_different_keys_run_at_the_same_time(flights: SingleFlight[Any, Any]) -> None:
    together = threading.Barrier(CALLERS)
    with ThreadPoolExecutor(CALLERS) as pool:
        futures = [
            pool.submit(flights.run, key, lambda: together.wait(LONG), LONG)
            for key in range(CALLERS)
        ]
    assert sorted(future.result() for future in futures) == list(range(CALLERS))


def test_a_later_call_starts_a_new_run(flights: SingleFlight[Any, Any]) -> None:
    results = iter(["first", "second"])
    assert flights.run("key", lambda: next(results), LONG) == "first"
    assert flights.run("key", lambda: next(results), LONG) == "second"


def test_a_call_after_an_error_starts_a_new_run(flights: SingleFlight[Any, Any]) -> None:
    def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        flights.run("key", fail, LONG)
    assert flights.run("key", lambda: "better", LONG) == "better"


def test_a_caller_that_times_out_leaves_and_the_next_joins_the_same_run(
    flights: SingleFlight[Any, Any],
) -> None:
    work, key = Work(), CountedKey(callers=2)  # this thread and the pool's
    with pytest.raises(TimeoutError):
        flights.run(key, work, timeout=0)
    assert work.begun.wait(LONG)
    with pytest.raises(TimeoutError):
        flights.run(key, work, timeout=0)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(flights.run, key, work, LONG)
        asked = key.all_asked.wait(LONG)
        work.release.set()
    assert asked
    assert third.result() == "a result"
    assert work.runs == 1


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt, SystemExit])
def test_an_error_of_any_class_reaches_the_caller(
    error: type[BaseException], flights: SingleFlight[Any, Any]
) -> None:
    def fail() -> None:
        raise error("from the work")

    with pytest.raises(error, match="from the work"):
        flights.run("key", fail, LONG)
    assert flights.run("key", lambda: "better", LONG) == "better"


def test_the_work_may_use_the_same_flights_for_another_key(
    flights: SingleFlight[Any, Any],
) -> None:
    inner = lambda: flights.run("inner", lambda: "a result", LONG)  # noqa: E731
    assert flights.run("outer", inner, LONG) == "a result"


def test_the_work_runs_in_the_context_of_the_caller_that_started_it(
    flights: SingleFlight[Any, Any],
) -> None:
    token = caller.set("the first")
    try:
        assert flights.run("key", caller.get, LONG) == "the first"
        flights.run("key", lambda: caller.set("the work"), LONG)
        assert caller.get() == "the first"
    finally:
        caller.reset(token)
    assert flights.run("key", caller.get, LONG) == "nobody"


def test_the_thread_of_a_run_has_a_name_and_is_a_daemon(
    flights: SingleFlight[Any, Any],
) -> None:
    thread = flights.run("key", threading.current_thread, LONG)
    assert thread is not threading.current_thread()
    assert thread.name == "a-flight"
    assert thread.daemon


def test_a_run_for_which_no_thread_can_start_is_an_error_of_the_system_and_can_be_repeated(
    flights: SingleFlight[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="can't start new thread"):
                flights.run("key", lambda: "a result", LONG)
    assert flights.run("key", lambda: "a result", LONG) == "a result"
