"""Callers that send a few bytes and then nothing."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.timing import within
from tools import crowd as module
from tools.crowd import crowd
from tools.rig import CannotMeasure

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.settimeout(20)
    return sock


def test_every_caller_sends_its_text_and_then_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROCESS_CALLERS", 2)  # so that there are two processes
    with ExitStack() as stack:
        with crowd(port_of(listener), 3, "half a "):
            callers = [stack.enter_context(accept(listener)) for _ in range(3)]
            assert [caller.recv(100) for caller in callers] == [b"half a "] * 3
            callers[0].settimeout(0.2)
            with pytest.raises(TimeoutError):
                callers[0].recv(100)
        assert [caller.recv(100) for caller in callers] == [b""] * 3


def test_a_caller_that_loses_its_connection_opens_another(listener: socket.socket) -> None:
    with crowd(port_of(listener), 1, "again"), within(10):
        for _ in range(2):
            with accept(listener) as caller:
                assert caller.recv(100) == b"again"


def test_a_crowd_without_a_connection_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = port_of(gone)
    with pytest.raises(CannotMeasure, match="only 0 of 2 callers"), crowd(port, 2):
        pass
