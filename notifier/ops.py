"""How operators see in: liveness, readiness, metrics, the request id, one log line per request."""

import logging
import re
import time
import uuid
from http import HTTPMethod, HTTPStatus
from typing import Any

from flask import Blueprint, Flask, Response, current_app, g, jsonify, request

from notifier import metrics
from notifier.errors import PreferencesUnavailable
from notifier.logs import request_id
from notifier.preferences import Preferences

# RFC 9110's and PATCH. A caller may send any word as a method.
METHODS = frozenset(HTTPMethod)

# Who asks whether we are ready hears within a second, however PostgreSQL hangs.
READINESS_WAIT = 0.75

blueprint = Blueprint("ops", __name__)
log = logging.getLogger(__name__)

_USABLE_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


def register(app: Flask) -> None:
    """Count, time and log every request, give it an id, and `app` its operators' endpoints."""
    app.register_blueprint(blueprint)
    app.before_request(_begin)
    app.after_request(_end)
    app.teardown_request(_forget)


@blueprint.get("/healthz", provide_automatic_options=False)
def healthz() -> Response:
    """Say that this process answers; no I/O."""
    return jsonify(message="server is running")


@blueprint.get("/readyz", provide_automatic_options=False)
def readyz() -> tuple[Response, int]:
    """Say whether this process should get requests, and what speaks against it."""
    notifier = current_app.extensions["notifier"]
    checks = {
        "preferences": _check_preferences(notifier.preferences),
        "shutdown": _check_shutdown(stopping=notifier.stopping()),
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


def _begin() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.began = time.monotonic()
    request_id.set(given if _USABLE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
    g.of_operators = request.blueprint == blueprint.name
    if not g.of_operators:
        metrics.ACTIVE_REQUESTS.inc()


def _end(response: Response) -> Response:
    response.headers["X-Request-Id"] = request_id.get() or ""
    seconds = time.monotonic() - g.began
    method = request.method if request.method in METHODS else "_OTHER"
    route = request.url_rule.rule if request.url_rule else "unmatched"
    metrics.served(method, route, response.status_code).record(seconds)
    log.log(
        _level(response.status_code),
        "request",
        extra={
            "method": method,
            "route": route,
            "status": response.status_code,
            "duration_ms": round(1000 * seconds, 1),
            **g.get("log_fields", {}),
        },
    )
    return response


def _level(status: int) -> int:
    if g.of_operators:
        return logging.DEBUG
    if status == HTTPStatus.SERVICE_UNAVAILABLE:  # nothing is broken, and there may be many
        return logging.WARNING
    return logging.ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO


def _forget(_: BaseException | None) -> None:
    if not g.of_operators:
        metrics.ACTIVE_REQUESTS.dec()
    request_id.set(None)  # the thread may log before its next request
