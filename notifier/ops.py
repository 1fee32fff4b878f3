"""How operators see in: liveness, the request id, one log line per request."""

import logging
import re
import time
import uuid
from http import HTTPMethod

from flask import Blueprint, Flask, Response, g, jsonify, request

from notifier.logs import request_id

HEALTH_PATH = "/healthz"

# RFC 9110's and PATCH. A caller may send any word as a method.
METHODS = frozenset(HTTPMethod)

blueprint = Blueprint("ops", __name__)
log = logging.getLogger(__name__)

_USABLE_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


def register(app: Flask) -> None:
    """Give every request an id and a log line, and `app` its operators' endpoints."""
    app.register_blueprint(blueprint)
    app.before_request(_begin)
    app.after_request(_end)
    app.teardown_request(_forget)


@blueprint.get(HEALTH_PATH, provide_automatic_options=False)
def healthz() -> Response:
    """Say that this process answers; no I/O."""
    return jsonify(message="server is running")


def _begin() -> None:
    given = request.headers.get("X-Request-Id", "")
    g.began = time.monotonic()
    request_id.set(given if _USABLE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)


def _end(response: Response) -> Response:
    response.headers["X-Request-Id"] = request_id.get() or ""
    quiet = request.path == HEALTH_PATH
    log.log(
        logging.DEBUG if quiet else logging.INFO,
        "request",
        extra={
            "method": request.method if request.method in METHODS else "_OTHER",
            "route": request.url_rule.rule if request.url_rule else "unmatched",
            "status": response.status_code,
            "duration_ms": round(1000 * (time.monotonic() - g.began), 1),
        },
    )
    return response


def _forget(_: BaseException | None) -> None:
    request_id.set(None)  # the thread may log before its next request
