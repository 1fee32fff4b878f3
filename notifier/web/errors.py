"""How each error becomes JSON. The only place that does."""

from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException, InternalServerError, MethodNotAllowed

from notifier.errors import ApiError, DeliveryFailed, InvalidRequest

# What werkzeug raises by itself, by status: code and message.
_HTTP_ERRORS = {
    404: ("E103", "no such path"),
    405: ("E104", "method not allowed"),
    413: ("E105", "body too large"),
}


def register(app: Flask) -> None:
    """Answer every error of `app` with `{"error": {"code", "message"}}`."""
    app.register_error_handler(ApiError, _api_error)
    app.register_error_handler(HTTPException, _http_error)
    # Not for Exception: unhandled ones arrive here too, once they are logged, and tests see them.
    app.register_error_handler(InternalServerError, _internal_error)


def _envelope(status: int, code: str, message: str) -> Response:
    response = jsonify(error={"code": code, "message": message})
    response.status_code = status
    return response


def _api_error(error: ApiError) -> Response:
    response = _envelope(error.status, error.code, error.message)
    response.headers.update(error.headers)
    return response


def _http_error(error: HTTPException) -> Response:
    if error.code not in _HTTP_ERRORS:
        return _api_error(InvalidRequest("the request could not be understood"))
    response = _envelope(error.code, *_HTTP_ERRORS[error.code])
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _internal_error(_: InternalServerError) -> Response:
    return _api_error(DeliveryFailed())
