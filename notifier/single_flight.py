"""Work that several threads want at once is done once, and nobody waits longer than they may.

For calls that cannot be interrupted (`getaddrinfo`, a connection to a hung PostgreSQL): the work
runs in a thread of its own, and callers leave when their time is up.
"""

import contextvars
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class SingleFlight(Generic[Key, Result]):
    """At most one run per key at any time. Shared: the runs under way, guarded by the lock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._flights: dict[Key, Future[Result]] = {}

    def run(self, key: Key, work: Callable[[], Result], timeout: float) -> Result:
        """Return what `work` returns, joining the run of `key` that is under way if there is one.

        Raises:
            TimeoutError: no result within `timeout` seconds; the run goes on.
            Exception: whatever the run raised.
        """
        with self._lock:
            flight = self._flights.get(key) or self._start(key, work)
        return flight.result(timeout)

    def _start(self, key: Key, work: Callable[[], Result]) -> Future[Result]:
        flight: Future[Result] = Future()
        fly = contextvars.copy_context().run  # its log lines carry the request id of who began it
        # A daemon: a look-up that hangs must not keep a stopping worker alive.
        threading.Thread(
            target=fly, args=(self._fly, key, work, flight), name=self._name, daemon=True
        ).start()
        self._flights[key] = flight
        return flight

    def _fly(self, key: Key, work: Callable[[], Result], flight: Future[Result]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 handed to those who wait
            self._land(key)
            flight.set_exception(error)
        else:
            self._land(key)
            flight.set_result(result)

    def _land(self, key: Key) -> None:
        with self._lock:
            del self._flights[key]
