"""The metrics, and the page that Prometheus scrapes.

The instruments are the only state on module level. Under gunicorn each worker counts in its own
files in `PROMETHEUS_MULTIPROC_DIR`, which the master makes before this module is imported. The
worker that answers a scrape adds up all files. The files are named by `METRICS_SLOT`, a number that
passes to the next worker: named by process id, files would pile up with each restart. Without
`METRICS_SLOT` the metrics are those of this process.

Names follow OpenTelemetry's: dots become underscores, with the unit and `_total`.
"""

import os
import platform
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pybreaker import STATE_CLOSED, STATE_HALF_OPEN, STATE_OPEN

from notifier import __version__
from notifier.sharing.merged_metrics import MergedMetrics
from notifier.sharing.metric_files import MetricFiles

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# Seconds: from an answer without I/O to a request that exceeds its 15 s.
BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0),
)

# Values of `OPEN_UNTIL` that are not times.
CLOSED, NOT_CONFIGURED = 0.0, -1.0

STATE_VALUES = {STATE_CLOSED: 0, STATE_OPEN: 1, STATE_HALF_OPEN: 2}

# The last status of RFC 9110. Statuses that a provider makes up must not become labels.
HIGHEST_STATUS = 599

disable_created_metrics()  # type: ignore[no-untyped-call]  # the files have no room for them

REGISTRY = CollectorRegistry()
_all_workers: Collector = REGISTRY
values.ValueClass = values.MutexValue
if _slot := os.environ.get("METRICS_SLOT"):
    _files = MetricFiles(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]), _slot)
    _all_workers = MergedMetrics(_files.folder, REGISTRY, _files.are_among)
    values.ValueClass = _files.value

_SERVER = ("http_method", "http_route", "http_status_code")
_CLIENT = ("http_method", "http_host", "http_status_code", "error")


def _counter(name: str, what: str, *labels: str) -> Counter:
    return Counter(name, what, labels, registry=REGISTRY)


def _histogram(name: str, what: str, *labels: str) -> Histogram:
    return Histogram(name, what, labels, buckets=BUCKETS, registry=REGISTRY)


_SERVER_REQUESTS = _counter("http_server_requests_total", "Requests answered.", *_SERVER)
_SERVER_DURATION = _histogram(
    "http_server_duration_seconds",
    "Seconds from the arrival of a request to the reply.",
    *_SERVER,
)
ACTIVE_REQUESTS = Gauge(
    "http_server_active_requests",
    "Requests in progress, without those of operators.",
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
_CLIENT_REQUESTS = _counter("http_client_requests_total", "Calls to providers.", *_CLIENT)
_CLIENT_DURATION = _histogram(
    "http_client_duration_seconds",
    "Seconds from name look-up to the provider's answer.",
    *_CLIENT,
)
_NOTIFICATIONS = _counter(
    "notifications_total", "Notifications over all channels.", "recipient", "outcome"
)
_NOTIFICATION_DURATION = _histogram(
    "notification_duration_seconds", "Seconds of a delivery over all channels.", "recipient"
)
REFUSED = _counter("notifications_refused_total", "Notifications refused for lack of a place.")
WAIT = _histogram(
    "notification_wait_seconds",
    "Seconds that queued notifications waited since they arrived, admitted or refused.",
)
PLACES = Gauge(
    "notification_places",
    "Maximum of notifications under way at once.",
    multiprocess_mode="livesum",
    registry=REGISTRY,
)
_NOTIFICATION_CHANNELS = _counter(
    "notification_channel_total",
    "Notifications by channel and by the provider that delivered, if any.",
    *("channel", "provider", "outcome"),
)
_FALLBACKS = _counter(
    "notification_fallback_total",
    "Deliveries by a provider that is not the channel's first.",
    "channel",
)
PREFERENCE_CACHE = _counter(
    "preference_cache_total", "Look-ups of a channel's providers.", "result"
)
LAST_REFRESH = Gauge(
    "preference_last_refresh_timestamp_seconds",
    "Time of the last load of providers, the oldest of all workers; 0 for never.",
    multiprocess_mode="livemin",
    registry=REGISTRY,
)
LISTENER_CONNECTED = Gauge(
    "preference_listener_connected",
    "1 if all workers listen for changes of providers, else 0.",
    multiprocess_mode="livemin",
    registry=REGISTRY,
)
LISTENER_RECONNECTS = _counter(
    "preference_listener_reconnects_total", "Attempts to listen for changes again."
)
NOTIFICATIONS_HEARD = _counter(
    "preference_notifications_total", "Notifications of changed providers, over all workers."
)
STATE_CHANGES = _counter(
    "circuit_breaker_state_changes_total",
    "State changes of circuit breakers, over all workers.",
    *("host", "from_state", "to_state"),
)
# The page shows `circuit_breaker_state` instead, because half-open begins by the clock.
OPEN_UNTIL = Gauge(
    "circuit_breaker_open_until",
    "Hidden: CLOSED, NOT_CONFIGURED, or the monotonic time when open ends.",
    ["host"],
    multiprocess_mode="livemax",
    registry=REGISTRY,
)
LOG_LINES_DROPPED = _counter(
    "log_lines_dropped_total", "Log lines that the workers dropped: nobody read the log in time."
)
WORKER_STARTS = _counter("worker_starts_total", "Worker processes started.")
_BUILD_INFO = Gauge(
    "notifier_build_info",
    "Always 1; the labels name the versions.",
    ["version", "python_version"],
    multiprocess_mode="livemax",
    registry=REGISTRY,
)
_BUILD_INFO.labels(__version__, platform.python_version()).set(1)


class Timed(NamedTuple):
    """The two instruments of one kind of event."""

    total: Counter
    duration: Histogram

    def record(self, seconds: float) -> None:
        """Count one event that took `seconds`."""
        self.total.inc()
        self.duration.observe(seconds)


@cache
def server_requests(method: str, route: str, status: int) -> Timed:
    """Return the instruments of requests with these labels; cached."""
    labels = (method, route, str(status))
    return Timed(_SERVER_REQUESTS.labels(*labels), _SERVER_DURATION.labels(*labels))


@cache
def client_calls(endpoint: str, status: int | None, error: str = "") -> Timed:
    """Return the instruments of calls to `endpoint` with these labels; cached."""
    labels = ("POST", endpoint, _code(status), error)
    return Timed(_CLIENT_REQUESTS.labels(*labels), _CLIENT_DURATION.labels(*labels))


def _code(status: int | None) -> str:
    if status is None:
        return ""
    return str(status) if status <= HIGHEST_STATUS else "_OTHER"


@cache
def notifications(recipient: str, outcome: str) -> Timed:
    """Return the instruments of notifications with these labels; cached."""
    return Timed(
        _NOTIFICATIONS.labels(recipient, outcome), _NOTIFICATION_DURATION.labels(recipient)
    )


@cache
def channel_notifications(channel: str, provider: str, outcome: str) -> Counter:
    """Return the instrument of channels with these labels; cached."""
    return _NOTIFICATION_CHANNELS.labels(channel, provider, outcome)


@cache
def fallbacks(channel: str) -> Counter:
    """Return the instrument of fallbacks in `channel`; cached."""
    return _FALLBACKS.labels(channel)


def page() -> bytes:
    """Return the metrics of all workers in Prometheus's text format."""
    return generate_latest(_Presentable(_all_workers))


class _Presentable(Collector):
    """Sorts the metrics, and shows `circuit_breaker_state` in place of `OPEN_UNTIL`."""

    def __init__(self, source: Collector) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for family in sorted(self._source.collect(), key=lambda family: family.name):
            yield _states(family) if family.name == "circuit_breaker_open_until" else family


def _states(open_until: Metric) -> Metric:
    states = GaugeMetricFamily(
        "circuit_breaker_state",
        "0 closed, 1 open, 2 half-open: the worst state in any worker.",
        labels=["host", "state"],
    )
    for sample in open_until.samples:
        if sample.value != NOT_CONFIGURED:
            state = _state(sample.value)
            states.add_metric([sample.labels["host"], state], STATE_VALUES[state])
    return states


def _state(open_until: float) -> str:
    if open_until == CLOSED:
        return STATE_CLOSED
    return STATE_OPEN if open_until > time.monotonic() else STATE_HALF_OPEN
