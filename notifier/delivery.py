"""From a recipient to its channels, and in each from provider to provider until one accepts."""

import contextvars
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from notifier import metrics
from notifier.attempts import Attempts
from notifier.errors import AttemptFailed, AttemptOutcome, PreferencesUnavailable
from notifier.models import Channel, ChannelOutcome, Message, Provider, Recipient
from notifier.settings import MIN_ATTEMPT
from notifier.store.preferences import Preferences

CHANNELS = {
    Recipient.BUYER: (Channel.EMAIL,),
    Recipient.SELLER: (Channel.EMAIL, Channel.PUSH),
}

log = logging.getLogger(__name__)


class ChannelResult(NamedTuple):
    """How one channel ended, through which provider, after how many attempts.

    `skipped` counts the providers that were not asked.
    """

    channel: Channel
    outcome: ChannelOutcome
    provider: str | None = None
    attempts: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """How a notification ended, over each of its channels and so as a whole."""

    channels: tuple[ChannelResult, ...]

    @property
    def outcome(self) -> ChannelOutcome:
        """That of the channel that ended worst."""
        return ChannelOutcome.worst(result.outcome for result in self.channels)


class Delivery:
    """Delivers messages. One per worker; called by request threads.

    Args:
        threads: how many channels beyond each request's first may be under way at once.
    """

    def __init__(self, preferences: Preferences, attempts: Attempts, threads: int) -> None:
        self._preferences = preferences
        self._attempts = attempts
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fan-out")
        _start_at_zero()

    def close(self) -> None:
        """Wait for the deliveries under way, and end the threads."""
        self._pool.shutdown()

    def deliver(self, recipient: Recipient, message: Message, deadline: float) -> Report:
        """Reach `recipient` over all its channels at once; return when all of them have ended.

        Args:
            deadline: of the whole request, on `time.monotonic()`.
        """
        began = time.monotonic()
        outcome = ChannelOutcome.FAILED  # should something unforeseen end it
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
        under_way = [self._submit(channel, message, deadline) for channel in others]
        try:
            result = self._through(first, message, deadline)
        finally:
            wait(under_way)
        return (result, *(future.result() for future in under_way))

    def _submit(
        self, channel: Channel, message: Message, deadline: float
    ) -> "Future[ChannelResult]":
        run = contextvars.copy_context().run  # the request id goes along
        return self._pool.submit(run, self._through, channel, message, deadline)

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
        outcomes: list[AttemptOutcome] = []
        for provider in providers:
            if deadline - time.monotonic() < MIN_ATTEMPT:
                log.error("deadline passed", extra={"channel": channel})
                break
            outcomes.append(self._attempt(provider, message, deadline))
            if outcomes[-1] is AttemptOutcome.ACCEPTED:
                if len(outcomes) > 1:
                    metrics.fallbacks(channel).inc()
                return _result(channel, ChannelOutcome.DELIVERED, provider.name, outcomes)
            if outcomes[-1].ends_channel:
                break
        return _result(channel, ChannelOutcome.FAILED, None, outcomes)

    def _attempt(self, provider: Provider, message: Message, deadline: float) -> AttemptOutcome:
        try:
            self._attempts.send(provider, message, deadline)
        except AttemptFailed as failure:
            return failure.outcome
        return AttemptOutcome.ACCEPTED


def _result(
    channel: Channel,
    outcome: ChannelOutcome,
    provider: str | None,
    attempts: list[AttemptOutcome],
) -> ChannelResult:
    skipped = attempts.count(AttemptOutcome.SKIPPED)
    return ChannelResult(channel, outcome, provider, len(attempts) - skipped, skipped)


def _start_at_zero() -> None:
    """Export what can be counted before it is, or its first increase would go unseen."""
    for recipient, outcome in product(Recipient, ChannelOutcome):
        metrics.notifications(recipient, outcome)
    for channel in Channel:
        metrics.fallbacks(channel)
        metrics.channel_notifications(channel, "", ChannelOutcome.FAILED)
        metrics.channel_notifications(channel, "", ChannelOutcome.NO_PROVIDER)
