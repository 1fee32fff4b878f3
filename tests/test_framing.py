"""The end of a body is found as its bytes arrive, however they are split."""

from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http import RequestParser

from notifier.serving.framing import MAX_CHUNKED_BYTES, Body, Framing, framing_of
from notifier.settings import MAX_BODY_BYTES

WHOLE = [
    b"0\r\n\r\n",
    b"4\r\nbody\r\n0\r\n\r\n",
    b"1\r\nb\r\n3;x=y\r\nody\r\n0\r\n\r\n",
    b"000A \t;x\r\n0123456789\r\n0;last\r\nX: y\r\nZ: z\r\n\r\n",
    b"2\r\n\r\n\r\n4\r\n\r\n\r\n\r\n00\r\n\r\n",
    b"4\r\n0\r\n\r\r\n0\r\n\r\n",
]
UNUSABLE = [b"\r\n", b"-5\r\n", b"0x4\r\n", b"x\r\n", b"4 4\r\n", b"+4\r\n", b"1_0\r\n", b";x\r\n"]


def parsed(field: str) -> Any:
    head = f"POST / HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n".encode()
    return next(RequestParser(Config(), iter([head]), ("127.0.0.1", 1)))


def chunks() -> Framing:
    return framing_of(parsed("Transfer-Encoding: chunked"))


def length(bytes_: int) -> Framing:
    return framing_of(parsed(f"Content-Length: {bytes_}"))


@pytest.mark.parametrize("body", WHOLE)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_chunked_body_is_whole_with_its_last_byte(body: bytes, step: int) -> None:
    framing = chunks()
    for arrived in range(0, len(body), step):
        assert framing.body(body[:arrived]) is Body.PART
    assert framing.body(body) is Body.WHOLE
    assert chunks().body(body + b"GET / HTTP/1.1") is Body.WHOLE


@pytest.mark.parametrize("body", UNUSABLE)
@pytest.mark.parametrize("before", [b"", b"1\r\nb\r\n"])
def test_a_malformed_size_ends_the_wait(body: bytes, before: bytes) -> None:
    assert chunks().body(before + body) is Body.UNUSABLE


def test_a_chunked_body_that_is_too_long_ends_the_wait() -> None:
    size = b"%x\r\n" % (MAX_BODY_BYTES + 1)
    assert chunks().body(size + b"x" * MAX_BODY_BYTES) is Body.PART
    assert chunks().body(size + b"x" * (MAX_BODY_BYTES + 1)) is Body.UNUSABLE
    small = b"1\r\nx\r\n"
    many = small * (MAX_CHUNKED_BYTES // len(small) + 1)
    assert chunks().body(many[:MAX_BODY_BYTES]) is Body.PART
    assert chunks().body(many) is Body.UNUSABLE
    assert chunks().body(b"f" * 1000 + b"\r\n") is Body.PART


def test_a_length_is_awaited_unless_it_is_too_long() -> None:
    assert length(4).body(b"bod") is Body.PART
    assert length(4).body(b"body") is Body.WHOLE
    assert length(4).body(b"body and more") is Body.WHOLE
    assert length(MAX_BODY_BYTES).body(b"") is Body.PART
    assert length(MAX_BODY_BYTES + 1).body(b"") is Body.UNUSABLE
    assert framing_of(parsed("X: y")).body(b"") is Body.WHOLE
