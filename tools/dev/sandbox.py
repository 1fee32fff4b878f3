"""A stand-in until the sandbox page lands: the mock providers with their own pages."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from tools.dev.mock_provider import MockProvider


class Sandbox:
    def __init__(
        self, mocks: Sequence[tuple[str, int]], service: str, bind: str = "127.0.0.1"
    ) -> None:
        self._mocks = mocks
        self._stack = ExitStack()

    def heard(self, entry: Mapping[str, Any]) -> None:
        pass

    def __enter__(self) -> Self:
        for name, port in self._mocks:
            self._stack.enter_context(MockProvider(name, port))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
