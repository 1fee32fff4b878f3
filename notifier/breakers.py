"""Circuit breakers, one per endpoint: each decides whether its endpoint may be called now.

pybreaker supplies the states, their storage and the listeners. Its own admission is replaced.
`CircuitBreaker.call` holds its lock during the call, so calls to one endpoint would run one after
another. It also counts consecutive failures, while we count the share of failures in recent calls.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass

from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
    CircuitBreakerListener,
    CircuitBreakerState,
    CircuitMemoryStorage,
)

from notifier import metrics

WINDOW_BUCKETS = 10

CHANGES = (
    (STATE_CLOSED, STATE_OPEN),
    (STATE_OPEN, STATE_HALF_OPEN),
    (STATE_HALF_OPEN, STATE_CLOSED),
    (STATE_HALF_OPEN, STATE_OPEN),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """When a breaker trips and recovers; times in seconds."""

    max_half_open: int
    open_seconds: float
    min_calls: int
    failure_percent: int
    window_seconds: float


class RollingWindow:
    """Counts the calls of the last `seconds`, in buckets. The breaker's lock must guard it."""

    def __init__(self, seconds: float) -> None:
        self._bucket_seconds = seconds / WINDOW_BUCKETS
        # [number, calls, failures], oldest first
        self._buckets: deque[list[int]] = deque(maxlen=WINDOW_BUCKETS)

    def add(self, now: float, *, failed: bool) -> None:
        number = int(now / self._bucket_seconds)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append([number, 0, 0])
        self._buckets[-1][1] += 1
        if failed:
            self._buckets[-1][2] += 1

    def totals(self, now: float) -> tuple[int, int]:
        """Return the numbers of calls and failures in the window that ends at `now`."""
        oldest = int(now / self._bucket_seconds) - WINDOW_BUCKETS + 1
        while self._buckets and self._buckets[0][0] < oldest:
            self._buckets.popleft()
        return sum(b[1] for b in self._buckets), sum(b[2] for b in self._buckets)

    def clear(self) -> None:
        self._buckets.clear()


class Call:
    """A call that a breaker admitted, and its result.

    Without a recorded result, the call is not counted, and its slot becomes free again.
    """

    __slots__ = ("failed", "generation")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.failed: bool | None = None

    def record(self, *, failed: bool | None) -> None:
        """Record the result; None if it says nothing about the health of the endpoint."""
        self.failed = failed


class Breaker:
    """The breaker of one endpoint in this worker.

    Shared between threads: all attributes, guarded by `_lock`. It is held to admit a call and to
    record its result, never during the call. Each change of state begins a new generation; a call
    that was admitted in an earlier generation changes nothing.
    """

    def __init__(
        self, endpoint: str, policy: Policy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.endpoint = endpoint
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._changes = _Changes(endpoint)
        self._storage = CircuitMemoryStorage(STATE_CLOSED)
        self._machine = CircuitBreaker(
            name=endpoint, state_storage=self._storage, listeners=[self._changes]
        )
        self._window = RollingWindow(policy.window_seconds)
        self._generation = 0
        self._in_flight = 0  # of this generation
        self._open_until = metrics.CLOSED
        self._configured = False
        self._shown = metrics.OPEN_UNTIL.labels(endpoint)

    @property
    def state(self) -> str:
        """`closed`, `open`, or `half-open`: an open breaker turns half-open by the clock."""
        with self._lock:
            return self._state()

    def configure(self, *, configured: bool) -> None:
        """Show the state in the metrics, or hide it even while calls are under way."""
        with self._lock:
            self._configured = configured
            self._shown.set(self._open_until if configured else metrics.NOT_CONFIGURED)

    @contextmanager
    def calling(self) -> Iterator[Call]:
        """Admit one call for the length of the block, which records its result.

        Raises:
            CircuitBreakerError: the call is not admitted and must not be made.
        """
        with self._lock:
            call = self._admit()
        try:
            self._changes.announce()
            yield call
        finally:
            with self._lock:
                self._settle(call)
            self._changes.announce()

    def _state(self) -> str:
        state = self._storage.state
        if state == STATE_OPEN and self._clock() >= self._open_until:
            return STATE_HALF_OPEN
        return state

    def _admit(self) -> Call:
        state = self._state()
        if state == STATE_OPEN:
            raise CircuitBreakerError(f"{self.endpoint} is open")
        if state == STATE_HALF_OPEN:
            self._admit_probe()
        self._in_flight += 1
        return Call(self._generation)

    def _admit_probe(self) -> None:
        if self._storage.state == STATE_OPEN:
            self._change(self._machine.half_open)
        if self._in_flight + self._storage.success_counter >= self._policy.max_half_open:
            raise CircuitBreakerError(f"{self.endpoint} is half-open and has no free probe")

    def _settle(self, call: Call) -> None:
        if call.generation != self._generation:
            return
        self._in_flight -= 1
        if call.failed is None:
            return
        if self._storage.state == STATE_HALF_OPEN:
            self._settle_probe(failed=call.failed)
        else:
            self._count(failed=call.failed)

    def _settle_probe(self, *, failed: bool) -> None:
        if failed:
            self._open()
            return
        self._storage.increment_success_counter()
        if self._storage.success_counter >= self._policy.max_half_open:
            self._change(self._machine.close)
            self._window.clear()
            self._open_until = metrics.CLOSED
            self._show()

    def _count(self, *, failed: bool) -> None:
        now = self._clock()
        self._window.add(now, failed=failed)
        if not failed:
            return
        calls, failures = self._window.totals(now)
        policy = self._policy
        if calls >= policy.min_calls and 100 * failures >= policy.failure_percent * calls:
            self._open()

    def _open(self) -> None:
        self._open_until = self._clock() + self._policy.open_seconds
        self._change(self._machine.open)
        self._show()

    def _show(self) -> None:
        # Under the lock, or an older state could replace a newer one.
        if self._configured:
            self._shown.set(self._open_until)

    def _change(self, transition: Callable[[], object]) -> None:
        transition()
        self._generation += 1
        self._in_flight = 0


class _Changes(CircuitBreakerListener):
    """Counts changes of state, and logs them after the breaker's lock is released."""

    def __init__(self, endpoint: str) -> None:
        self._changes: deque[tuple[str | None, str, str]] = deque()
        self._counts = {
            change: metrics.STATE_CHANGES.labels(endpoint, *change) for change in CHANGES
        }

    def state_change(
        self,
        cb: CircuitBreaker,
        old_state: CircuitBreakerState | None,
        new_state: CircuitBreakerState,
    ) -> None:
        old = old_state.name if old_state else STATE_CLOSED
        self._counts[old, new_state.name].inc()
        self._changes.append((cb.name, old, new_state.name))

    def announce(self) -> None:
        while self._changes:
            try:
                endpoint, old, new = self._changes.popleft()
            except IndexError:  # another thread was faster
                return
            level = logging.WARNING if new == STATE_OPEN else logging.INFO
            log.log(
                level,
                "circuit breaker changed state",
                extra={"host": endpoint, "from_state": old, "to_state": new},
            )


class Breakers:
    """The breakers of this worker by endpoint.

    Shared between threads: the dict. Single reads are atomic; `_lock` guards its changes.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lock = threading.Lock()
        self._by_endpoint: dict[str, Breaker] = {}

    def of(self, endpoint: str) -> Breaker:
        """Return the breaker of `endpoint` (`mail.example.com:443`); a new one is closed."""
        return self._by_endpoint.get(endpoint) or self._add(endpoint)

    def configure(self, endpoints: Set[str]) -> None:
        """Keep breakers for `endpoints` only; not to be called concurrently.

        A request that read an older configuration may still use other breakers, which the metrics
        do not show.
        """
        for endpoint in endpoints:
            self.of(endpoint).configure(configured=True)
        with self._lock:
            gone = [self._by_endpoint.pop(name) for name in self._by_endpoint.keys() - endpoints]
        for breaker in gone:
            breaker.configure(configured=False)

    def _add(self, endpoint: str) -> Breaker:
        with self._lock:
            if endpoint not in self._by_endpoint:
                self._by_endpoint[endpoint] = Breaker(endpoint, self._policy)
            return self._by_endpoint[endpoint]
