"""Waiting for what gives no event, and bounds that a hang would break."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer: generous bounds of deadlines, never measures of speed."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.2f} s"


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Ask again and again until `condition` holds; fail if it does not in time."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.02)
