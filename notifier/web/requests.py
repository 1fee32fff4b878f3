"""The id, log line and metrics of every request, and access to the service."""

import logging
import random
import re
import time
from dataclasses import dataclass, field
from http import HTTPMethod, HTTPStatus
from typing import Any, cast

from flask import Flask, Response, current_app, g, request

from notifier import metrics
from notifier.arrival import Arrival
from notifier.logs import request_id
from notifier.notifications import Notifier
from notifier.serving.turns import Turn

# RFC 9110's, and PATCH. A caller may send any other word as a method; metrics do not show it.
METHODS = frozenset(HTTPMethod)

# The blueprint of the operators' endpoints. Their requests are counted, but not among the active
# ones, and logged at DEBUG.
OPERATORS = "ops"

log = logging.getLogger(__name__)

_USABLE_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


class Unlimited:
    """The turn of a request in a server that has no turns, such as that of `flask run`."""

    def __init__(self) -> None:
        self.arrival = Arrival.now()

    def wait(self) -> None:
        """Do nothing."""

    def resume(self) -> None:
        """Do nothing."""


@dataclass(slots=True)
class CurrentRequest:
    """The request that this thread is answering.

    `turn` is its turn to run, from the server. `log_fields` go into its log line.
    """

    turn: Turn | Unlimited
    is_operators: bool
    log_fields: dict[str, Any] = field(default_factory=dict)


def current_request() -> CurrentRequest:
    """Return the request that this thread is answering."""
    return cast("CurrentRequest", g.current)


def notifier() -> Notifier:
    """Return the service of this worker."""
    return cast("Notifier", current_app.extensions["notifier"])


def register(app: Flask) -> None:
    """Count, time and log every request of `app`, and give it an id."""
    app.before_request(_begin)
    app.after_request(_end)
    app.teardown_request(_forget)


def _begin() -> None:
    given = request.environ.get("HTTP_X_REQUEST_ID", "")
    request_id.set(given if _USABLE_REQUEST_ID.fullmatch(given) else _new_request_id())
    turn = request.environ.get("notifier.turn") or Unlimited()
    g.current = CurrentRequest(turn, request.blueprint == OPERATORS)
    if not g.current.is_operators:
        metrics.ACTIVE_REQUESTS.inc()


def _new_request_id() -> str:
    """Return 32 random hexadecimal digits; they need not be hard to guess."""
    return f"{random.getrandbits(128):032x}"


def _end(response: Response) -> Response:
    response.headers["X-Request-Id"] = request_id.get() or ""
    current = current_request()
    seconds = time.monotonic() - current.turn.arrival.time
    method = request.method if request.method in METHODS else "_OTHER"
    rule = request.url_rule
    route = rule.rule if rule else "unmatched"
    metrics.server_requests(method, route, response.status_code).record(seconds)
    log.log(
        _level(current, response.status_code),
        "request",
        extra={
            "method": method,
            "route": route,
            "status": response.status_code,
            "duration_ms": round(1000 * seconds, 1),
            **current.log_fields,
        },
    )
    return response


def _level(current: CurrentRequest, status: int) -> int:
    if current.is_operators:
        return logging.DEBUG
    if request.environ.get("notifier.refusal"):  # a stranger must not fill the log with errors
        return logging.INFO
    if status == HTTPStatus.SERVICE_UNAVAILABLE:  # overload is no failure, and may be frequent
        return logging.WARNING
    return logging.ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO


def _forget(_: BaseException | None) -> None:
    if not current_request().is_operators:
        metrics.ACTIVE_REQUESTS.dec()
    request_id.set(None)  # the thread may log before its next request
