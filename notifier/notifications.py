"""The service in one worker: gives each notification a place and a deadline, and delivers it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from notifier import metrics
from notifier.arrival import Arrival
from notifier.attempts import Attempts
from notifier.capacity import Capacity
from notifier.delivery import Delivery, Report
from notifier.models import Message, Recipient
from notifier.settings import Settings
from notifier.sharing.snapshot import Snapshot
from notifier.store.handover import Handover
from notifier.store.preferences import Preferences
from notifier.store.refresher import Refresher

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Notifier:
    """The parts of the service in one worker, made after the fork.

    `stopping` returns True once the service has been asked to stop.
    """

    settings: Settings
    preferences: Preferences
    refresher: Refresher
    attempts: Attempts
    delivery: Delivery
    capacity: Capacity
    stopping: Callable[[], bool] = lambda: False

    def start(self, stopping: Callable[[], bool], snapshot: Snapshot | None = None) -> None:
        """Begin to serve; not called in a process that only runs a command.

        Args:
            snapshot: the memory that the workers share; None if there is none.
        """
        self.stopping = stopping
        if snapshot:
            self.preferences.inherit(Handover(snapshot, self.settings))
        self.refresher.start()
        metrics.WORKER_STARTS.inc()

    def close(self) -> None:
        """Close the parts in reverse order; log a failure, and still close the rest."""
        for close in (self.delivery.close, self.attempts.close, self.refresher.close):
            _close(close)

    def notify(self, recipient: Recipient, message: Message, arrival: Arrival) -> Report:
        """Deliver one message over every channel of `recipient`, and report how each ended.

        Raises:
            Overloaded: no place was free in time; nothing was sent.
        """
        self.capacity.take(arrival)
        try:
            deadline = arrival.time + self.settings.notify_deadline
            return self.delivery.deliver(recipient, message, deadline)
        finally:
            self.capacity.give()


def _close(close: Callable[[], None]) -> None:
    try:
        close()
    except Exception:
        log.exception("could not close", extra={"part": close.__qualname__})
