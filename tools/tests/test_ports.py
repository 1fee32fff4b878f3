"""The ports of `make run`: which SANDBOX_PORT asks for, and what is said about those in use."""

import socket

import pytest

from tests.fixtures import MakeSettings
from tests.service import free_port
from tools.dev import ports, seed


def test_without_the_variable_the_documented_ports_are_used() -> None:
    assert ports.mocks({}) == seed.PROVIDERS
    assert [mock.port for mock in ports.mocks({"SANDBOX_PORT": " "})] == [9090, 9091, 9092, 9093]


@pytest.mark.parametrize("first", [1, 7000, 65532])
def test_the_variable_moves_all_four(first: int) -> None:
    moved = ports.mocks({"SANDBOX_PORT": str(first)})
    assert [mock.port for mock in moved] == list(range(first, first + 4))
    assert [mock.name for mock in moved] == [mock.name for mock in seed.PROVIDERS]


@pytest.mark.parametrize("value", ["0", "65533", "-1", "9090.0", "9_090", "many", "٩"])
def test_any_other_value_is_refused(value: str) -> None:
    with pytest.raises(ports.PortError) as refused:
        ports.mocks({"SANDBOX_PORT": value})
    assert str(refused.value).startswith('SANDBOX_PORT is "')
    expected = ": expected a whole number from 1 to 65532, the first of 4 ports"
    assert str(refused.value).endswith(expected)


@pytest.mark.parametrize("offset", range(4))
def test_the_services_port_has_to_be_another(make_settings: MakeSettings, offset: int) -> None:
    sandbox = seed.from_port(7000)
    with pytest.raises(ports.PortError) as refused:
        ports.check(make_settings(http_server_port=7000 + offset), sandbox)
    assert str(refused.value) == (
        f"HTTP_SERVER_PORT is {7000 + offset}, the port of the mock provider"
        f' "{sandbox[offset].name}": change HTTP_SERVER_PORT or SANDBOX_PORT'
    )


def test_a_taken_port_of_the_sandbox_names_the_variable_that_moves_it(
    make_settings: MakeSettings,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sandbox = [seed.PROVIDERS[1]._replace(port=port)]
        with pytest.raises(ports.PortError) as refused:
            ports.check(make_settings(http_server_port=free_port()), sandbox)
    assert str(refused.value) == (
        f'port {port}, for the mock provider "email 2", is taken, perhaps by another make run:'
        " stop that, or set SANDBOX_PORT to the first of 1 other ports"
    )


def test_a_taken_port_of_the_service_names_the_variable_that_moves_it(
    make_settings: MakeSettings,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ports.PortError) as refused:
            ports.check(make_settings(http_server_port=port), [])
    assert str(refused.value) == (
        f"port {port}, for the service, is taken, perhaps by another make run:"
        " stop that, or set HTTP_SERVER_PORT to another"
    )


def test_a_port_that_may_not_be_used_is_named(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(port: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ports, "_try", refuse)
    with pytest.raises(ports.PortError) as refused:
        ports.check(make_settings(http_server_port=80), [])
    assert str(refused.value) == (
        "port 80, for the service, is not usable (Permission denied):"
        " set HTTP_SERVER_PORT to another"
    )


def test_free_ports_pass(make_settings: MakeSettings) -> None:
    sandbox = [seed.PROVIDERS[0]._replace(port=free_port())]
    ports.check(make_settings(http_server_port=free_port()), sandbox)
