"""The watchdog cuts off what is late, and nothing else."""

import threading
import time
from collections.abc import Iterator

import pytest

from notifier.wire.watchdog import GRACE, Watchdog
from tests.timing import eventually


class Watched:
    """An exchange that only knows whether it was cut off."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.cut = threading.Event()

    def cut_off(self) -> None:
        self.cut.set()


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


def test_what_is_late_is_cut_off_and_what_has_time_is_not(watchdog: Watchdog) -> None:
    late, in_time = Watched(0), Watched(3600)
    with watchdog.watching(in_time), watchdog.watching(late):
        assert late.cut.wait(20)
    assert time.monotonic() > late.deadline + GRACE
    assert not in_time.cut.is_set()


def test_what_has_ended_is_left_alone(watchdog: Watchdog) -> None:
    ended, late = Watched(0), Watched(0)
    with watchdog.watching(ended):
        pass
    with watchdog.watching(late):
        assert late.cut.wait(20)
    assert not ended.cut.is_set()


def test_one_thread_watches_over_all_and_ends_with_it() -> None:
    def watchdogs() -> int:
        return sum(thread.name == "watchdog" for thread in threading.enumerate())

    before, watchdog, together = watchdogs(), Watchdog(), threading.Barrier(8)

    def watch() -> None:
        together.wait(20)
        with watchdog.watching(Watched(3600)):
            together.wait(20)

    threads = [threading.Thread(target=watch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watchdogs() == before + 1
    watchdog.close()
    eventually(lambda: watchdogs() == before)
