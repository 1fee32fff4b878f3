"""Preferences with the refresher that keeps them up to date, in the test's own process."""

import threading
from typing import Any

from notifier import metrics
from notifier.models import Channel
from notifier.settings import Settings
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.store.refresher import Refresher
from tests.timing import eventually

NAME = "the-refresher"  # of its connections, in the server's list


class Refreshed:
    """Preferences and their refresher; the variables of its service, and places as they are."""

    def __init__(self, variables: dict[str, str], lifetime: float, **places: Any) -> None:
        settings = Settings.from_env(variables | {"APP_NAME": NAME})
        listening = Database.listening(settings)
        places = {"database": Database(settings), "listening": listening} | places
        self.preferences = Preferences(places["database"], lifetime)
        self.refresher = Refresher(self.preferences, **places)

    def __enter__(self) -> "Refreshed":
        metrics.LISTENER_CONNECTED.set(0)
        self.refresher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresher.close()

    def ids(self, channel: Channel = Channel.EMAIL) -> list[int]:
        """Return the rows that are held for the channel; -1 while nothing is."""
        if not self.preferences.held():
            return [-1]
        return [provider.id for provider in self.preferences.for_channel(channel, 0)]


def refreshers() -> int:
    """Return how many threads there are of refreshers."""
    return sum(thread.name == "refresher" for thread in threading.enumerate())


def listening() -> bool:
    """Say what the metric says."""
    (family,) = metrics.LISTENER_CONNECTED.collect()
    return family.samples[0].value == 1


def wait_until_listening() -> None:
    eventually(listening)
