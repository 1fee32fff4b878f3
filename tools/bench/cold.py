"""The service with a cache that stays empty: each look-up is like the first one after a start."""

from unittest.mock import patch

from flask import Flask

from notifier import app as service
from notifier.models import Channel, Provider
from notifier.store.preferences import Preferences


class ColdPreferences(Preferences):
    """Preferences that query PostgreSQL at every look-up, as a new worker does at its first."""

    def for_channel(self, channel: Channel, deadline: float) -> tuple[Provider, ...]:
        """Return the active providers of `channel`, freshly read from PostgreSQL."""
        return Preferences(self._database, self.lifetime).for_channel(channel, deadline)


def create_app() -> Flask:
    """Return the WSGI application."""
    with patch.object(service, "Preferences", ColdPreferences):
        return service.create_app()
