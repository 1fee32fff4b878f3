"""The ports of `make run`: which ones it needs, and whether they are free."""

import errno
import json
import socket
from collections.abc import Mapping, Sequence

from notifier.environ import whole_number
from notifier.settings import Settings
from tools import HOST
from tools.dev import seed
from tools.dev.seed import Mock

# Names the port of the page and the first mock provider. The others take the next ports.
VARIABLE = "SANDBOX_PORT"
_FIRST = whole_number(1, 65_535 - len(seed.PROVIDERS) + 1)


class PortError(Exception):
    """A port cannot be used; the message names the variable that moves it."""


def mocks(environment: Mapping[str, str]) -> tuple[Mock, ...]:
    """Return the mock providers with the ports that SANDBOX_PORT sets.

    Raises:
        PortError: the variable is no port, or leaves no room for the other ports.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return seed.PROVIDERS
    try:
        return seed.from_port(_FIRST.parse(text))
    except ValueError:
        raise PortError(
            f"{VARIABLE} is {json.dumps(text[:100])}: expected {_FIRST.expected}, "
            f"the first of {len(seed.PROVIDERS)} ports"
        ) from None


def check(settings: Settings, sandbox: Sequence[Mock]) -> None:
    """Check that the service and the mock providers can have their ports.

    Raises:
        PortError: the service and a mock provider have the same port, or one is taken.
    """
    wanted = {mock.port: f'the mock provider "{mock.name}"' for mock in sandbox}
    service = settings.http_server_port
    if service in wanted:
        raise PortError(
            f"HTTP_SERVER_PORT is {service}, the port of {wanted[service]}: "
            f"change HTTP_SERVER_PORT or {VARIABLE}"
        )
    for port, owner in wanted.items():
        moved_by = f"set {VARIABLE} to the first of {len(wanted)} other ports"
        _check_one(port, owner, moved_by)
    _check_one(service, "the service", "set HTTP_SERVER_PORT to another")


def _check_one(port: int, owner: str, moved_by: str) -> None:
    try:
        _try(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"taken, perhaps by another make run: stop that, or {moved_by}"
        else:
            why = f"not usable ({error.strerror}): {moved_by}"
        raise PortError(f"port {port}, for {owner}, is {why}") from None


def _try(port: int) -> None:
    """Raise the OSError that listening on `port` would raise."""
    with socket.socket() as probe:  # macOS lets two programs bind one port in different ways
        if probe.connect_ex((HOST, port)) == 0:
            raise OSError(errno.EADDRINUSE, "is taken")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not for TIME_WAIT
        probe.bind((HOST, port))
