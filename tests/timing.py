"""Polling for conditions that give no event, and time limits that catch a hang."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer. Limits are generous: they catch hangs, not slowness."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.2f} s"


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until `condition` holds; fail if it does not within `seconds`."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it never came true"
        time.sleep(0.02)
