"""Preferences and their refresher, run in the test's own process."""

import threading
from typing import Any

from notifier import metrics
from notifier.models import Channel
from notifier.settings import Settings
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.store.refresher import Refresher
from tests.timing import eventually

NAME = "the-refresher"  # the application_name of its connections in pg_stat_activity


class Refreshed:
    """Preferences and a running refresher.

    `variables` are the service's environment. `places` replace the databases that the refresher
    reads from and listens on.
    """

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
        """Return the ids of the channel's cached rows, or [-1] while nothing is cached."""
        if not self.preferences.held():
            return [-1]
        return [provider.id for provider in self.preferences.for_channel(channel, 0)]


def refreshers() -> int:
    """Return the number of refresher threads."""
    return sum(thread.name == "refresher" for thread in threading.enumerate())


def listening() -> bool:
    """Return True if the metric says that the refresher is listening."""
    (family,) = metrics.LISTENER_CONNECTED.collect()
    return family.samples[0].value == 1


def wait_until_listening() -> None:
    eventually(listening)
