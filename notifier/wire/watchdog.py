"""Ends the TLS connections that would outlive the time of their exchange."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# How often it looks, and how late an exchange may be that ends by itself; seconds.
PAUSE = 0.1
GRACE = 0.1


class Watched(Protocol):
    """What is watched: something with a deadline on `time.monotonic()`, which can be cut off."""

    deadline: float

    def cut_off(self) -> None: ...


class Watchdog:
    """Watches over exchanges, from a thread that begins with the first and ends with `close`.

    OpenSSL steps over what is no data, requests for a hello or session tickets say, and while a
    peer sends them without a pause it does not come back to Python, where time-outs are kept.

    Shared: the exchanges under way, a set of which only single operations are used; `_lock` guards
    that the thread begins once.
    """

    def __init__(self) -> None:
        self._under_way: set[Watched] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @contextmanager
    def watching(self, exchange: Watched) -> Iterator[None]:
        """Cut `exchange` off should the block outlive its deadline."""
        if self._thread is None:
            self._begin()
        self._under_way.add(exchange)
        try:
            yield
        finally:
            self._under_way.discard(exchange)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                thread.start()
                self._thread = thread

    def _watch(self) -> None:
        while not self._closed.wait(PAUSE):
            late = time.monotonic() - GRACE
            for exchange in self._under_way.copy():
                if exchange.deadline < late:
                    exchange.cut_off()
