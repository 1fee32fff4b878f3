"""Runs work once for all threads that ask for it at the same time, and limits their wait.

It is for calls that cannot be interrupted, such as `getaddrinfo` or a connection to a hung
PostgreSQL. The work runs in its own thread, and callers stop waiting when their time is up.
"""

import contextvars
import errno
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def start(thread: threading.Thread) -> None:
    """Start `thread`.

    Raises:
        OSError: the system has no resources for another thread.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, "can't start new thread") from error


class SingleFlight(Generic[Key, Result]):
    """Allows one run per key at a time. Shared between threads: `_flights`, guarded by `_lock`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._flights: dict[Key, Future[Result]] = {}

    def run(self, key: Key, work: Callable[[], Result], timeout: float) -> Result:
        """Return the result of `work`, or of a run of `key` that is already under way.

        Raises:
            TimeoutError: no result within `timeout` seconds; the run continues.
            OSError: the system has no resources for a thread.
            Exception: any error that the run raised.
        """
        with self._lock:
            flight = self._flights.get(key) or self._start(key, work)
        return flight.result(timeout)

    def _start(self, key: Key, work: Callable[[], Result]) -> Future[Result]:
        flight: Future[Result] = Future()
        fly = contextvars.copy_context().run  # log lines carry the first caller's request id
        # A daemon: a hung look-up must not keep a stopping worker alive.
        args = (self._fly, key, work, flight)
        start(threading.Thread(target=fly, args=args, name=self._name, daemon=True))
        self._flights[key] = flight
        return flight

    def _fly(self, key: Key, work: Callable[[], Result], flight: Future[Result]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 handed to the waiting threads
            self._land(key)
            flight.set_exception(error)
        else:
            self._land(key)
            flight.set_result(result)

    def _land(self, key: Key) -> None:
        with self._lock:
            del self._flights[key]
