"""Shared fixtures: PostgreSQL, databases copied from a migrated one, settings, providers."""

import fcntl
import itertools
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from notifier import metrics
from notifier.environ import Secret
from notifier.settings import Settings
from notifier.store import migrations
from notifier.store.db import Database
from notifier.variables import unknown_variables
from notifier.wire import exchange, streams
from notifier.wire.transport import Transport
from tests.certificates import make_certificate
from tests.scripted_provider import Script, ScriptedProvider
from tests.service import Service
from tools.dev import postgres

Environment = dict[str, str]
MakeSettings = Callable[..., Settings]
MakeProvider = Callable[..., ScriptedProvider]
MakeTransport = Callable[..., Transport]
# The CA bundle and the server's TLS context, both None for plain HTTP.
Wire = tuple[Path | None, ssl.SSLContext | None]
LookUp = Callable[[], list[streams.Address]]
Growth = Callable[[str], dict[tuple[str, ...], float]]

# Variables that the session removes, so that a developer's shell cannot change a test's result.
_FIELDS = [*Settings.__dataclass_fields__, *(f"{f}_file" for f in Settings.__dataclass_fields__)]
_OURS = [*_FIELDS, "http_proxy", "https_proxy", "all_proxy", "no_proxy"]

# The id of this xdist worker (`gw0`, `gw1`, …), or empty.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")

_names = itertools.count(1)


@pytest.fixture(autouse=True, scope="session")
def _clean_environment() -> None:
    for name in _OURS:
        os.environ.pop(name.upper(), None)
        os.environ.pop(name, None)
    for name in unknown_variables(os.environ, Settings.variables()):
        os.environ.pop(name)


@pytest.fixture(scope="session")
def processes() -> None:
    """Declares that a test starts programs, so that `make check` does not run it."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The `DB_*` variables of a throw-away PostgreSQL server that all xdist workers share.

    The services of all tests share its serving role too, so the role may open many connections.
    """
    folder = tmp_path_factory.getbasetemp()
    if _WORKER:
        folder = folder.parent
    with _locked(folder):
        share = _join_server(folder / "server")
    yield share.env | {"WEB_INSTANCES": "1000"}
    with _locked(folder):
        share.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "server.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _join_server(named: Path) -> postgres.Server:
    """Join the server whose directory is in the file `named`, or start one and name it there."""
    if named.exists() and (base := Path(named.read_text())).exists():
        return replace(postgres.acquire(base), ephemeral=True)
    share = postgres.acquire(ephemeral=True)
    named.write_text(str(share.base))
    return share


def connect(environment: Environment) -> psycopg.Connection[Any]:
    """Return a connection in autocommit mode to the database of `environment`."""
    return Database.migrating(Settings.from_env(environment)).connect()


def one_role(environment: Environment, name: str = "", password: str = "") -> Environment:
    """Return `environment` with a single role, by default the one that migrates."""
    owner, owners = Settings.from_env(environment).migrating_role
    role = {"DB_USERNAME": name or owner, "DB_PASSWORD": password or owners.read()}
    others = {"DB_MIGRATION_USERNAME", "DB_MIGRATION_PASSWORD"}
    return {key: value for key, value in environment.items() if key not in others} | role


def create_database(server: Environment, template: str = "template1") -> Environment:
    name = f"test_{_WORKER}{next(_names)}"
    # FILE_COPY takes a third less CPU time than the default strategy, WAL_LOG.
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
    with connect(server) as connection:
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    return server | {"DB_NAME": name}


def insert_provider(  # noqa: PLR0913 one for each column
    environment: Environment,
    url: str,
    channel: str = "Email",
    *,
    priority: int = 0,
    name: str = "a provider",
    secret_key: str | None = "s3cr3t-key",
) -> int:
    """Insert a row into the database of `environment` and return its id."""
    with connect(environment) as connection:
        row = connection.execute(
            "INSERT INTO notification_preferences"
            " (provider_type, provider_name, host, priority, secret_key)"
            " VALUES (%s, %s, %s, %s, %s) RETURNING id",
            (channel, name, url, priority, secret_key),
        ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture(scope="session")
def _migrated(server: Environment) -> Environment:
    environment = create_database(server)
    migrations.migrate(Settings.from_env(environment))
    return environment


@pytest.fixture
def empty_database(server: Environment) -> Environment:
    """The `DB_*` variables of a new, empty database."""
    return create_database(server)


@pytest.fixture
def database(server: Environment, _migrated: Environment) -> Environment:
    """The `DB_*` variables of a new database that has the schema and no rows."""
    return create_database(server, _migrated["DB_NAME"])


@pytest.fixture
def add_provider(database: Environment) -> Callable[..., int]:
    """Insert a row into `database` and return its id; see `insert_provider`."""
    return partial(insert_provider, database)


@pytest.fixture
def allow_connections(database: Environment, server: Environment) -> Callable[[str], None]:
    """Make `database` accept connections (`true`) or refuse them all (`false`)."""

    def allow(allowed: str) -> None:
        with connect(server) as connection:
            connection.execute(f"ALTER DATABASE {database['DB_NAME']} ALLOW_CONNECTIONS {allowed}")

    return allow


@pytest.fixture
def make_settings() -> MakeSettings:
    """Make settings with the fields that a test gives; their database is unreachable."""

    def make(**fields: Any) -> Settings:
        unreachable = {
            "db_host": "127.0.0.1",
            "db_port": "1",
            "db_name": "none",
            "db_username": "none",
            "db_password": Secret("none"),
        }
        return Settings(**(unreachable | fields))

    return make


@pytest.fixture
def growth() -> Growth:
    """Return how much each series of a metric grew since the test began, by label values."""

    def now() -> dict[tuple[str, tuple[str, ...]], float]:
        samples = (sample for family in metrics.REGISTRY.collect() for sample in family.samples)
        return {(sample.name, tuple(sample.labels.values())): sample.value for sample in samples}

    before = now()

    def of(name: str) -> dict[tuple[str, ...], float]:
        grown = {
            labels: value - before.get((series, labels), 0.0)
            for (series, labels), value in now().items()
            if series == name
        }
        return {labels: by for labels, by in grown.items() if by}

    return of


@pytest.fixture
def make_provider() -> Iterator[MakeProvider]:
    """Start providers on real sockets and stop them when the test ends."""
    with ExitStack() as stack:

        def make(
            script: Script | None = None, *, tls: ssl.SSLContext | None = None
        ) -> ScriptedProvider:
            return stack.enter_context(ScriptedProvider(script, tls=tls))

        yield make


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for `localhost` and 127.0.0.1, and a server's TLS context that uses it."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "DNS:localhost", "IP:127.0.0.1")


@pytest.fixture
def make_transport() -> Iterator[MakeTransport]:
    """Make transports, by default without proxies and with certifi's CA certificates."""
    with ExitStack() as stack:

        def make(ca_bundle: Path | None = None, proxies: dict[str, str] | None = None) -> Transport:
            transport = Transport(
                str(ca_bundle) if ca_bundle else None,
                proxies or {},
                connections=8,
                user_agent="notifier/test",
            )
            stack.callback(transport.close)
            return transport

        yield make


@pytest.fixture(params=["http", "https"])
def wire(request: pytest.FixtureRequest) -> Wire:
    """The CA bundle and the server's TLS context, both None for plain HTTP."""
    if request.param == "http":
        return None, None
    bundle, context = request.getfixturevalue("certificate")
    return bundle, context


@pytest.fixture
def provider(make_provider: MakeProvider, wire: Wire) -> ScriptedProvider:
    return make_provider(tls=wire[1])


@pytest.fixture
def transport(make_transport: MakeTransport, wire: Wire) -> Transport:
    return make_transport(wire[0])


@pytest.fixture
def short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time for draining a reply, which otherwise costs a test a whole second."""
    monkeypatch.setattr(exchange, "DRAIN_SECONDS", 0.2)


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[[LookUp], None]:
    """Replace the DNS look-up with `look_up`; numeric addresses still resolve to themselves."""
    real = streams.look_up

    def use(look_up: LookUp) -> None:
        def replaced(host: str, port: int, flags: int = 0) -> list[streams.Address]:
            return real(host, port, flags) if flags else look_up()

        monkeypatch.setattr(streams, "look_up", replaced)

    return use


@pytest.fixture
def start_service(tmp_path: Path, database: Environment) -> Iterator[Callable[..., Service]]:
    """Start gunicorn on `database` with the variables that a test gives; stop it at the end."""
    with ExitStack() as stack:

        def start(**variables: str) -> Service:
            service = Service(tmp_path, database | variables)
            stack.callback(service.stop)
            return service.wait_until_ready()

        yield start
