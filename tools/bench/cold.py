"""The service with a cache that holds nothing: each look-up is the first one after a start."""

from unittest.mock import patch

from flask import Flask

from notifier import app as service
from notifier.models import Channel, Provider
from notifier.store.preferences import Preferences


class ColdPreferences(Preferences):
    """Asks PostgreSQL at every look-up, as a worker does that has just been started."""

    def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel`, asked of PostgreSQL now."""
        return Preferences(self._database, self.lifetime).for_channel(channel, deadline)


def create_app() -> Flask:
    """Return the WSGI application."""
    with patch.object(service, "Preferences", ColdPreferences):
        return service.create_app()
