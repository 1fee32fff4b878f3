"""The application factory. Only this module wires the parts; no other module imports it."""

import os

from flask import Flask

from notifier import __version__
from notifier.addresses import Addresses
from notifier.attempts import Attempts
from notifier.breakers import Breakers, Policy
from notifier.capacity import Capacity
from notifier.cli import commands
from notifier.cli.parts import read_settings
from notifier.delivery import Delivery
from notifier.notifications import Notifier
from notifier.settings import MIN_ATTEMPT, MIN_DEADLINE, Settings
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.store.refresher import Refresher
from notifier.variables import proxies
from notifier.web import body, errors, notify, ops, requests
from notifier.wire.transport import Transport

# Maximum seconds that a notification waits for a place: a quick refusal beats a growing queue.
PATIENCE = 1.0


def create_app(settings: Settings | None = None) -> Flask:
    """Return the WSGI application; without `settings` they are read from the environment."""
    settings = settings or read_settings()
    app = Flask("notifier", static_folder=None)
    app.url_map.merge_slashes = False  # or a doubled slash would get a redirect, in HTML
    if settings:  # None where flask only looks for a command
        app.extensions["notifier"] = build(settings)
        body.register(app, Addresses(allow_local=settings.allow_local_addresses == "on"))
    app.register_blueprint(notify.blueprint)
    app.register_blueprint(ops.blueprint)
    requests.register(app)
    errors.register(app)
    commands.register(app)
    return app


def build(settings: Settings) -> Notifier:
    """Make the parts; nothing connects or starts a thread before it is needed."""
    database = Database(settings)
    breakers = Breakers(_policy(settings))
    preferences = Preferences(database, settings.cache_expired_time, on_load=breakers.configure)
    refresher = Refresher(
        preferences,
        database,
        listening=Database.listening(settings) if settings.cache_invalidation == "on" else None,
        replica=Database.reading(settings) if settings.read_place != settings.serve_place else None,
    )
    transport = Transport(
        ca_bundle=settings.requests_ca_bundle or settings.curl_ca_bundle,
        proxies=proxies(os.environ),
        # A seller's notification has two calls in progress.
        connections=2 * settings.web_threads,
        user_agent=f"notifier/{__version__}",
    )
    attempts = Attempts(transport, breakers, settings.http_client_timeout)
    delivery = Delivery(preferences, attempts, settings.web_threads)
    # After the longest wait there is still time for an attempt.
    patience = min(PATIENCE, settings.notify_deadline - MIN_DEADLINE)
    latest = settings.notify_deadline - MIN_ATTEMPT
    capacity = Capacity(settings.web_threads, patience, latest)
    return Notifier(settings, preferences, refresher, attempts, delivery, capacity)


def _policy(settings: Settings) -> Policy:
    return Policy(
        max_half_open=settings.circuit_breaker_max_half_open_requests,
        open_seconds=settings.circuit_breaker_open_state_timeout,
        min_calls=settings.circuit_breaker_min_requests_before_trip,
        failure_percent=settings.circuit_breaker_failure_threshold_percent,
        window_seconds=settings.circuit_breaker_window,
    )
