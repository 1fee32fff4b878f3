"""Turns every error into JSON. No other module does."""

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, InternalServerError, MethodNotAllowed

from notifier.errors import ApiError, DeliveryFailed, InvalidRequest
from notifier.web.requests import current_request

# Code and message of the errors that werkzeug raises itself, by status.
_HTTP_ERRORS = {
    404: ("E103", "no such path"),
    405: ("E104", "method not allowed"),
    413: ("E105", "body too large"),
}

# Messages of the code E112, by the status of a request that the server refused to pass on.
_REFUSALS = {
    400: "malformed HTTP request",
    403: "not allowed for this address",
    414: "URL too long",
    417: "only the expectation 100-continue is supported",
    431: "too many header fields, or one that is too long",
    501: "this transfer coding is not supported",
}


def register(app: Flask) -> None:
    """Answer every error of `app` with `{"error": {"code", "message"}}`."""
    app.register_error_handler(ApiError, _api_error)
    app.register_error_handler(HTTPException, _http_error)
    # Not for Exception: flask logs an unhandled one first and passes it on as this, or to a test.
    app.register_error_handler(InternalServerError, _internal_error)


def _envelope(status: int, code: str, message: str) -> Response:
    current_request().log_fields["code"] = code
    response = jsonify(error={"code": code, "message": message})
    response.status_code = status
    return response


def _api_error(error: ApiError) -> Response:
    response = _envelope(error.status, error.code, error.message)
    if error.reason:
        current_request().log_fields["reason"] = error.reason
    response.headers.update(error.headers)
    return response


def _http_error(error: HTTPException) -> Response:
    if refusal := request.environ.get("notifier.refusal"):
        return _refused(*refusal)
    if error.code not in _HTTP_ERRORS:
        return _api_error(InvalidRequest("the request could not be understood"))
    response = _envelope(error.code, *_HTTP_ERRORS[error.code])
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _refused(status: int, reason: str) -> Response:
    """Answer a request that the server refused to pass on; `request` is a placeholder."""
    if status not in _REFUSALS:
        return _api_error(DeliveryFailed())
    response = _envelope(status, "E112", _REFUSALS[status])
    current_request().log_fields.update(reason=reason, ip=request.remote_addr)
    return response


def _internal_error(_: InternalServerError) -> Response:
    return _api_error(DeliveryFailed())
