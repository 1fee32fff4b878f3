"""Callers that notify buyers and sellers continuously, and record every reply."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from tools.chaos.evidence import Reply
from tools.rig import MESSAGE, concurrent_calls, path_of

CALLERS = 8  # at most the threads of a worker, so that no request waits for one
PAUSE = 0.06  # seconds between a reply and the next request
TIMEOUT = 20.0


@contextmanager
def load(url: str) -> Iterator[list[Reply]]:
    """Notify over kept and over new connections during the block; yield the growing replies."""
    replies: list[Reply] = []
    stop = threading.Event()
    numbers = itertools.count(1)

    def call(recipient: str, keep: bool) -> None:
        with requests.Session() as session:
            session.trust_env = False
            session.headers["Connection"] = "keep-alive" if keep else "close"
            while not stop.wait(PAUSE):
                replies.append(_notify(session, url, recipient, f"chaos-{next(numbers)}"))

    with concurrent_calls(CALLERS, call, stop):
        yield replies


def _notify(session: requests.Session, url: str, recipient: str, request_id: str) -> Reply:
    began, clock = time.time(), time.monotonic()
    try:
        answer = session.post(
            url + path_of(recipient),
            json=MESSAGE,
            headers={"X-Request-Id": request_id},
            timeout=TIMEOUT,
        )
    except requests.Timeout:
        return Reply(request_id, recipient, began, time.monotonic() - clock, 0)
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
        return Reply(request_id, recipient, began, time.monotonic() - clock, 0, cut=True)
    seconds = time.monotonic() - clock
    return Reply(
        request_id, recipient, began, seconds, answer.status_code, _parsed(answer), answer.headers
    )


def _parsed(answer: requests.Response) -> object:
    try:
        return answer.json()
    except ValueError:
        return None
