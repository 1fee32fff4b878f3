"""Delivers over each channel of a recipient, through the first of its providers that accepts."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from notifier import metrics
from notifier.attempts import Attempts
from notifier.errors import DEADLINE, AttemptFailed, AttemptOutcome, PreferencesUnavailable
from notifier.models import Channel, ChannelOutcome, Message, Provider, Recipient
from notifier.settings import MIN_ATTEMPT
from notifier.store.preferences import Preferences

CHANNELS = {
    Recipient.BUYER: (Channel.EMAIL,),
    Recipient.SELLER: (Channel.EMAIL, Channel.PUSH),
}

log = logging.getLogger(__name__)


class ProviderResult(NamedTuple):
    """The outcome of one provider of a channel.

    `reason` is None if the provider accepted. `ms` is the duration of the call in milliseconds,
    None if the provider was not called.
    """

    provider: str
    outcome: AttemptOutcome
    reason: str | None = None
    ms: int | None = None

    def log_fields(self) -> dict[str, Any]:
        named = zip(self._fields, self, strict=True)
        return {name: value for name, value in named if value is not None}


class ChannelResult(NamedTuple):
    """The outcome of one channel.

    `providers` are in the order of priority, up to the one that accepted. There are none if the
    channel has no provider, or if the preferences could not be read.
    """

    channel: Channel
    outcome: ChannelOutcome
    providers: tuple[ProviderResult, ...] = ()

    @property
    def provider(self) -> str | None:
        """The provider that accepted."""
        return self.providers[-1].provider if self.outcome is ChannelOutcome.DELIVERED else None

    def log_fields(self) -> dict[str, Any]:
        skipped = [result.outcome for result in self.providers].count(AttemptOutcome.SKIPPED)
        return {
            "channel": self.channel,
            "outcome": self.outcome,
            "provider": self.provider,
            "attempts": len(self.providers) - skipped,
            "skipped": skipped,
            "providers": [result.log_fields() for result in self.providers],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a notification on each of its channels."""

    channels: tuple[ChannelResult, ...]

    @property
    def outcome(self) -> ChannelOutcome:
        """The outcome of the channel that ended worst."""
        return ChannelOutcome.worst(result.outcome for result in self.channels)

    def log_fields(self) -> list[dict[str, Any]]:
        """Return the `channels` field of the request's log line."""
        return [result.log_fields() for result in self.channels]


class _Once:
    """Work that runs once: in a pool thread, or in the thread that needs its result."""

    def __init__(self, work: Callable[[], ChannelResult]) -> None:
        self._work = work
        self._begun = threading.Lock()
        self._future: Future[ChannelResult] = Future()

    def run(self) -> None:
        """Run the work, unless a thread has begun it."""
        if not self._begun.acquire(blocking=False):
            return
        try:
            self._future.set_result(self._work())
        except BaseException as error:  # noqa: BLE001 handed to the waiting thread
            self._future.set_exception(error)

    def result(self) -> ChannelResult:
        """Return the result, or raise the error; run the work here if no thread has begun it."""
        self.run()
        return self._future.result()


class Delivery:
    """Delivers messages. One per worker; called by request threads.

    Args:
        threads: maximum channels in progress at once, the first of each request not counted.
    """

    def __init__(self, preferences: Preferences, attempts: Attempts, threads: int) -> None:
        self._preferences = preferences
        self._attempts = attempts
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fan-out")
        _start_at_zero()

    def close(self) -> None:
        """Wait for the deliveries in progress, and end the threads."""
        self._pool.shutdown()

    def deliver(self, recipient: Recipient, message: Message, deadline: float) -> Report:
        """Deliver over all channels of `recipient` at once; return when all of them have ended.

        Args:
            deadline: of the whole request, on `time.monotonic()`.
        """
        began = time.monotonic()
        outcome = ChannelOutcome.FAILED  # for an unforeseen exception
        try:
            report = Report(self._fan_out(CHANNELS[recipient], message, deadline))
            outcome = report.outcome
        finally:
            metrics.notifications(recipient, outcome).record(time.monotonic() - began)
        return report

    def _fan_out(
        self, channels: tuple[Channel, ...], message: Message, deadline: float
    ) -> tuple[ChannelResult, ...]:
        """Run the first channel in this thread and the others in the pool; await all of them."""
        first, *others = channels
        if not others:
            return (self._through(first, message, deadline),)
        running = [self._submit(channel, message, deadline) for channel in others]
        try:
            result = self._through(first, message, deadline)
        finally:
            ended = [work.result() for work in running]
        return (result, *ended)

    def _submit(self, channel: Channel, message: Message, deadline: float) -> "_Once":
        run = contextvars.copy_context().run  # so that log lines have the request id
        work = _Once(partial(run, self._through, channel, message, deadline))
        # If no thread can start, the pool raises, although another of its threads may yet run it.
        with suppress(RuntimeError):
            self._pool.submit(work.run)
        return work

    def _through(self, channel: Channel, message: Message, deadline: float) -> ChannelResult:
        result = self._try(channel, message, deadline)
        metrics.channel_notifications(channel, result.provider or "", result.outcome).inc()
        return result

    def _try(self, channel: Channel, message: Message, deadline: float) -> ChannelResult:
        try:
            providers = self._preferences.for_channel(channel, deadline)
        except PreferencesUnavailable:
            log.error("preferences unavailable", extra={"channel": channel})  # noqa: TRY400
            return ChannelResult(channel, ChannelOutcome.FAILED)
        if not providers:
            log.error("no provider", extra={"channel": channel})
            return ChannelResult(channel, ChannelOutcome.NO_PROVIDER)
        return self._first_that_accepts(channel, providers, message, deadline)

    def _first_that_accepts(
        self, channel: Channel, providers: Iterable[Provider], message: Message, deadline: float
    ) -> ChannelResult:
        results: list[ProviderResult] = []
        for provider in providers:
            results.append(self._attempt(provider, message, deadline))
            if results[-1].outcome is AttemptOutcome.ACCEPTED:
                if len(results) > 1:
                    metrics.fallbacks(channel).inc()
                return ChannelResult(channel, ChannelOutcome.DELIVERED, tuple(results))
        return ChannelResult(channel, ChannelOutcome.FAILED, tuple(results))

    def _attempt(self, provider: Provider, message: Message, deadline: float) -> ProviderResult:
        """Make one attempt, unless too little time is left for it."""
        began = time.monotonic()
        if deadline - began < MIN_ATTEMPT:
            return ProviderResult(provider.name, AttemptOutcome.SKIPPED, DEADLINE)
        try:
            self._attempts.send(provider, message, deadline)
        except AttemptFailed as failure:
            ms = None if failure.outcome is AttemptOutcome.SKIPPED else _ms_since(began)
            return ProviderResult(provider.name, failure.outcome, failure.reason, ms)
        return ProviderResult(provider.name, AttemptOutcome.ACCEPTED, ms=_ms_since(began))


def _ms_since(began: float) -> int:
    return round(1000 * (time.monotonic() - began))


def _start_at_zero() -> None:
    """Export each counter at 0, or Prometheus would miss its first increase."""
    for recipient, outcome in product(Recipient, ChannelOutcome):
        metrics.notifications(recipient, outcome)
    for channel in Channel:
        metrics.fallbacks(channel)
        metrics.channel_notifications(channel, "", ChannelOutcome.FAILED)
        metrics.channel_notifications(channel, "", ChannelOutcome.NO_PROVIDER)
