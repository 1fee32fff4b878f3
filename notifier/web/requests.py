"""What surrounds every request: its id, its log line, its counts."""

import logging
import re
import time
import uuid
from http import HTTPMethod, HTTPStatus

from flask import Flask, Response, g, request

from notifier import metrics
from notifier.logs import request_id
from notifier.web import ops

# RFC 9110's and PATCH. A caller may send any word as a method.
METHODS = frozenset(HTTPMethod)

log = logging.getLogger(__name__)

_USABLE_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


def register(app: Flask) -> None:
    """Count, time and log every request of `app`, and give it an id."""
    app.before_request(_begin)
    app.after_request(_end)
    app.teardown_request(_forget)


def _begin() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.began = time.monotonic()
    request_id.set(given if _USABLE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
    g.of_operators = request.blueprint == ops.blueprint.name
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
