"""Who is tried, in which order, within what time, and whether the recipient has been reached."""

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
from notifier.errors import AttemptFailed, PreferencesUnavailable
from notifier.models import Channel, Message, Provider, Recipient
from notifier.settings import MIN_ATTEMPT
from notifier.store.preferences import Preferences

CHANNELS = {
    Recipient.BUYER: (Channel.EMAIL,),
    Recipient.SELLER: (Channel.EMAIL, Channel.PUSH),
}

OUTCOMES = ("delivered", "failed", "no_provider")

log = logging.getLogger(__name__)


class ChannelResult(NamedTuple):
    """How one channel ended, through which provider, after how many attempts.

    `outcome` is one of `OUTCOMES`; `skipped` counts the providers that were not asked.
    """

    channel: Channel
    outcome: str
    provider: str | None = None
    attempts: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """How a notification ended, over each of its channels and so as a whole."""

    channels: tuple[ChannelResult, ...]

    @property
    def outcome(self) -> str:
        """`delivered` if every channel has, else `no_provider` if one has none, else `failed`."""
        outcomes = {result.outcome for result in self.channels}
        if outcomes == {"delivered"}:
            return "delivered"
        return "no_provider" if "no_provider" in outcomes else "failed"


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
        outcome = "failed"  # should something unforeseen end it
        try:
            report = Report(self._fan_out(CHANNELS[recipient], message, deadline))
            outcome = report.outcome
        finally:
            metrics.notified(recipient, outcome).record(time.monotonic() - began)
        return report

    def _fan_out(
        self, channels: tuple[Channel, ...], message: Message, deadline: float
    ) -> tuple[ChannelResult, ...]:
        """Run the first channel in this thread and the others in the pool; await all of them."""
        first, *others = channels
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
        metrics.tried(channel, result.provider or "", result.outcome).inc()
        return result

    def _try(self, channel: Channel, message: Message, deadline: float) -> ChannelResult:
        try:
            providers = self._preferences.for_channel(channel, deadline)
        except PreferencesUnavailable:
            log.error("preferences unavailable", extra={"channel": channel})  # noqa: TRY400
            return ChannelResult(channel, "failed")
        if not providers:
            log.error("no provider", extra={"channel": channel})
            return ChannelResult(channel, "no_provider")
        return self._first_that_accepts(channel, providers, message, deadline)

    def _first_that_accepts(
        self, channel: Channel, providers: Iterable[Provider], message: Message, deadline: float
    ) -> ChannelResult:
        attempts = skipped = 0
        for place, provider in enumerate(providers):
            if deadline - time.monotonic() < MIN_ATTEMPT:
                log.error("deadline passed", extra={"channel": channel})
                break
            try:
                self._attempts.send(provider, message, deadline)
            except AttemptFailed as failure:
                attempts += failure.outcome != "skipped"
                skipped += failure.outcome == "skipped"
                if failure.outcome == "cut_short":
                    break
            else:
                if place:
                    metrics.fell_back(channel).inc()
                return ChannelResult(channel, "delivered", provider.name, attempts + 1, skipped)
        return ChannelResult(channel, "failed", None, attempts, skipped)


def _start_at_zero() -> None:
    """Export what can be counted before it is, or its first increase would go unseen."""
    for recipient, outcome in product(Recipient, OUTCOMES):
        metrics.notified(recipient, outcome)
    for channel in Channel:
        metrics.fell_back(channel)
        metrics.tried(channel, "", "failed")
        metrics.tried(channel, "", "no_provider")
