"""Callers that notify buyers and sellers all the time, and record every reply."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from tools.chaos.evidence import Reply
from tools.rig import MESSAGE, at_once, path_of

CALLERS = 8  # no more than a worker has threads: none has to wait for one
PAUSE = 0.06  # seconds from a reply to the next request
GIVE_UP = 20.0


@contextmanager
def load(url: str) -> Iterator[list[Reply]]:
    """Notify over kept and over new connections while the block runs; the list gets every reply."""
    replies: list[Reply] = []
    enough = threading.Event()
    numbers = itertools.count(1)

    def call(recipient: str, keep: bool) -> None:
        with requests.Session() as session:
            session.trust_env = False
            session.headers["Connection"] = "keep-alive" if keep else "close"
            while not enough.wait(PAUSE):
                replies.append(_notify(session, url, recipient, f"chaos-{next(numbers)}"))

    with at_once(CALLERS, call, enough):
        yield replies


def _notify(session: requests.Session, url: str, recipient: str, request_id: str) -> Reply:
    began, clock = time.time(), time.monotonic()
    try:
        answer = session.post(
            url + path_of(recipient),
            json=MESSAGE,
            headers={"X-Request-Id": request_id},
            timeout=GIVE_UP,
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
