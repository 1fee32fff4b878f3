"""The words that a transport error has for its cause: the system's, and no library's."""

import socket
import ssl

import pytest
import requests

from notifier.errors import MAX_DETAIL, Fault, TransportError

SECRET = "s3cr3t-key"
URL = f"https://user:{SECRET}@mail.example.com/"


def caused_by(cause: BaseException | None) -> TransportError:
    error = TransportError(Fault.CONNECT)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("cause", "detail"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (OSError(113, "No route to host", URL), "no route to host"),
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION] wrong version (_ssl.c:1)"), "wrong version"),
        (TimeoutError("the deadline has passed"), "timed out"),
        (TimeoutError(110, "Connection timed out"), "connection timed out"),
        # Texts that may quote a URL, a header or a body.
        (OSError(f"cannot call {URL}"), None),
        (requests.exceptions.InvalidURL(f"Invalid URL {URL}"), None),
        (requests.exceptions.ConnectionError(URL, request=None), None),
        (ValueError(URL), None),
        (None, None),
    ],
    ids=repr,
)
def test_the_words_are_the_systems_and_never_a_librarys(
    cause: BaseException | None, detail: str | None
) -> None:
    assert caused_by(cause).detail == detail


def test_long_words_are_cut() -> None:
    assert caused_by(OSError(1, "x" * 1000)).detail == "x" * MAX_DETAIL
