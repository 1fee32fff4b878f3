"""Who is tried, in which order, within what time, and whether the recipient has been reached."""

import contextvars
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass

from notifier.errors import AttemptFailed, DeliveryFailed, PreferencesUnavailable
from notifier.logs import mask_address
from notifier.models import Channel, Message, Provider, Recipient
from notifier.preferences import Preferences
from notifier.providers import Providers
from notifier.settings import MIN_ATTEMPT

CHANNELS = {
    Recipient.BUYER: (Channel.EMAIL,),
    Recipient.SELLER: (Channel.EMAIL, Channel.PUSH),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChannelResult:
    """How one channel ended, through which provider, after how many attempts.

    `outcome` is one of `delivered` `failed` `no_provider`.
    """

    channel: Channel
    outcome: str
    provider: str | None = None
    attempts: int = 0


class Delivery:
    """Delivers messages. One per worker; called by request threads.

    Args:
        deadline: seconds for a whole request.
        threads: how many channels beyond each request's first may be under way at once.
    """

    def __init__(
        self, preferences: Preferences, providers: Providers, deadline: float, threads: int
    ) -> None:
        self._preferences = preferences
        self._providers = providers
        self._deadline = deadline
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fan-out")

    def close(self) -> None:
        """Wait for the deliveries under way, and end the threads."""
        self._pool.shutdown()

    def deliver(self, recipient: Recipient, message: Message) -> None:
        """Reach `recipient` over all its channels at once; return when all have delivered.

        Raises:
            DeliveryFailed: at least one channel has not; the others were still awaited.
        """
        deadline = time.monotonic() + self._deadline
        results = self._fan_out(CHANNELS[recipient], message, deadline)
        delivered = all(result.outcome == "delivered" for result in results)
        log.log(
            logging.INFO if delivered else logging.ERROR,
            "notification delivered" if delivered else "notification failed",
            extra={
                "recipient": recipient,
                "to": mask_address(message.to),
                "channels": [asdict(result) for result in results],
            },
        )
        if not delivered:
            raise DeliveryFailed

    def _fan_out(
        self, channels: tuple[Channel, ...], message: Message, deadline: float
    ) -> list[ChannelResult]:
        """Run the first channel in this thread and the others in the pool; await all of them."""
        first, *others = channels
        under_way = [self._submit(channel, message, deadline) for channel in others]
        try:
            result = self._through(first, message, deadline)
        finally:
            wait(under_way)
        return [result, *(future.result() for future in under_way)]

    def _submit(
        self, channel: Channel, message: Message, deadline: float
    ) -> "Future[ChannelResult]":
        run = contextvars.copy_context().run  # the request id goes along
        return self._pool.submit(run, self._through, channel, message, deadline)

    def _through(self, channel: Channel, message: Message, deadline: float) -> ChannelResult:
        try:
            providers = self._preferences.providers(channel, deadline)
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
        attempts = 0
        for provider in providers:
            if deadline - time.monotonic() < MIN_ATTEMPT:
                log.error("deadline passed", extra={"channel": channel})
                break
            try:
                self._providers.send(provider, message, deadline)
            except AttemptFailed as failure:
                attempts += failure.outcome != "skipped"
                if failure.outcome == "cut_short":
                    break
            else:
                return ChannelResult(channel, "delivered", provider.name, attempts + 1)
        return ChannelResult(channel, "failed", None, attempts)
