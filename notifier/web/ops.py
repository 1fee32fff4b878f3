"""Endpoints for operators: liveness, readiness, metrics."""

import time
from typing import Any

from flask import Blueprint, Response, jsonify

from notifier import metrics
from notifier.errors import PreferencesUnavailable
from notifier.store.preferences import Preferences
from notifier.web.requests import OPERATORS, notifier

# Seconds. `/readyz` answers within a second, even if PostgreSQL hangs.
READINESS_WAIT = 0.75

blueprint = Blueprint(OPERATORS, __name__)


@blueprint.get("/healthz", provide_automatic_options=False)
def healthz() -> Response:
    """Say that this process answers; no I/O."""
    return jsonify(message="server is running")


@blueprint.get("/readyz", provide_automatic_options=False)
def readyz() -> tuple[Response, int]:
    """Report, check by check, whether this process should get requests."""
    checks = {
        "preferences": _check_preferences(notifier().preferences),
        "shutdown": _check_shutdown(stopping=notifier().stopping()),
    }
    ready = all(check["ok"] for check in checks.values())
    return jsonify(ready=ready, checks=checks), 200 if ready else 503


@blueprint.get("/metrics", provide_automatic_options=False)
def show_metrics() -> Response:
    """Return the metrics of all workers for Prometheus."""
    return Response(metrics.page(), content_type=metrics.CONTENT_TYPE)


def _check_preferences(preferences: Preferences) -> dict[str, Any]:
    if preferences.held():
        return {"ok": True, "detail": "held in cache"}
    try:
        preferences.load(time.monotonic() + READINESS_WAIT)
    except PreferencesUnavailable:
        return {"ok": False, "detail": "not held in cache, and PostgreSQL cannot be asked"}
    return {"ok": True, "detail": "loaded from PostgreSQL"}


def _check_shutdown(*, stopping: bool) -> dict[str, Any]:
    return {"ok": not stopping, "detail": "under way" if stopping else "not asked for"}
