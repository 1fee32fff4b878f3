"""Endpoints for operators: an overview, liveness, readiness, metrics."""

import time
from typing import Any

from flask import Blueprint, Response, jsonify

from notifier import __version__, metrics
from notifier.errors import PreferencesUnavailable
from notifier.store.preferences import Preferences
from notifier.web.requests import OPERATORS, current_request, notifier

# Seconds. `/readyz` answers within a second, even if PostgreSQL hangs.
READINESS_WAIT = 0.75

OVERVIEW = {
    "service": "notifier",
    "version": __version__,
    "purpose": "delivers notifications to buyers by email, and to sellers by email and push",
    "endpoints": {
        "POST /api/v1.0/recipient/<recipient>/notify": "send a notification to a buyer or seller",
        "GET /healthz": "liveness",
        "GET /readyz": "readiness",
        "GET /metrics": "metrics for Prometheus",
    },
    # Paths in the repository.
    "documents": {
        "README.md": "start here",
        "docs/api.md": "requests, replies and errors",
        "docs/providers.md": "add and change providers",
        "docs/settings.md": "environment variables",
        "docs/operations.md": "start, stop, upgrade",
        "docs/monitoring.md": "metrics, alerts and logs",
        "docs/troubleshooting.md": "from a symptom to its cause",
    },
}

blueprint = Blueprint(OPERATORS, __name__)


# Not strict: a caller may send a URL without a path, and must not get a redirect to HTML.
@blueprint.get("/", strict_slashes=False, provide_automatic_options=False)
def overview() -> Response:
    """Return the service's purpose, endpoints and documents."""
    return jsonify(OVERVIEW)


@blueprint.get("/healthz", provide_automatic_options=False)
def healthz() -> Response:
    """Answer without I/O: the process is alive."""
    return jsonify(message="server is running")


@blueprint.get("/readyz", provide_automatic_options=False)
def readyz() -> tuple[Response, int]:
    """Return each check, and 200 only if this process should get requests."""
    checks = {
        "preferences": _check_preferences(notifier().preferences),
        "shutdown": _check_shutdown(stopping=notifier().stopping()),
    }
    ready = all(check["ok"] for check in checks.values())
    return jsonify(ready=ready, checks=checks), 200 if ready else 503


@blueprint.get("/metrics", provide_automatic_options=False)
def show_metrics() -> Response:
    """Return the metrics of all workers for Prometheus."""
    current_request().turn.wait()  # a long page must not delay notifications
    return Response(metrics.page(), content_type=metrics.CONTENT_TYPE)


def _check_preferences(preferences: Preferences) -> dict[str, Any]:
    if preferences.held():
        return {"ok": True, "detail": "held in cache"}
    current_request().turn.wait()
    try:
        preferences.load(time.monotonic() + READINESS_WAIT)
    except PreferencesUnavailable:
        return {
            "ok": False,
            "detail": "not held in cache, and PostgreSQL cannot be read: see the log",
        }
    return {"ok": True, "detail": "loaded from PostgreSQL"}


def _check_shutdown(*, stopping: bool) -> dict[str, Any]:
    return {"ok": not stopping, "detail": "in progress" if stopping else "not requested"}
