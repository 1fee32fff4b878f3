"""The refresher with servers that not every machine has: a standby, TLS and a pooler."""

import logging
import os
import signal
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import certifi
import pytest
from psycopg import ConnectionInfo

from notifier.settings import Settings
from notifier.store import migrations
from notifier.store.db import Connection, Database
from notifier.store.preferences import Load, Preferences
from notifier.store.refresher import PROBES
from tests.fixtures import Environment, Growth, MakeProvider, connect
from tests.pgbouncer import PgBouncer
from tests.refreshed import Refreshed, listening, wait_until_listening
from tests.service import Service
from tests.system_postgres import SystemPostgres, Tls
from tests.timing import eventually

LONG, SOON = 600.0, 1.0

Reasons = Callable[[], set[str]]


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Reasons:
    """Return the reasons of all database errors logged so far."""

    def of() -> set[str]:
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        return {record.__dict__["reason"] for record in errors}

    return of


def add(environment: Environment) -> int:
    """Insert a row and return its id."""
    insert = (
        "INSERT INTO notification_preferences (provider_type, provider_name, host)"
        " VALUES ('Email', 'a provider', 'http://a/') RETURNING id"
    )
    with connect(environment) as connection:
        ((added,),) = connection.execute(insert).fetchall()
    return int(added)


# --- a standby


@pytest.fixture(scope="module")
def primary(processes: None) -> Iterator[SystemPostgres]:
    with SystemPostgres() as primary:
        migrations.migrate(Settings.from_env(primary.environment))
        yield primary


@pytest.fixture(scope="module")
def standby(primary: SystemPostgres) -> Iterator[SystemPostgres]:
    with primary.standby() as standby:
        yield standby


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """For each load: True if it came from a standby, and True if it was kept."""
    loads: list[tuple[bool, bool]] = []
    keep = Preferences._keep

    def note(preferences: Preferences, load: Load, generation: int) -> bool:
        loads.append((load.from_standby, keep(preferences, load, generation)))
        return loads[-1][1]

    monkeypatch.setattr(Preferences, "_keep", note)
    return loads


@pytest.mark.needs("postgresql")
def test_a_lagging_replica_never_restores_old_rows_and_is_used_again_once_it_has_caught_up(
    primary: SystemPostgres,
    standby: SystemPostgres,
    kept: list[tuple[bool, bool]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    variables = primary.environment | {"DB_READ_PORT": standby.environment["DB_PORT"]}
    replica = Database.reading(Settings.from_env(variables))
    with Refreshed(variables, SOON, replica=replica) as made:
        wait_until_listening()
        rows = [*made.ids(), add(primary.environment)]
        eventually(lambda: made.ids() == rows)
        eventually(lambda: (True, True) in kept)

        standby.execute("SELECT pg_wal_replay_pause()")
        eventually(
            lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)]
        )
        rows.append(add(primary.environment))
        eventually(lambda: made.ids() == rows)
        kept.clear()
        while kept.count((True, False)) < 3:
            assert made.ids() == rows
        assert kept.count((False, True)) >= 2  # the primary was read instead
        assert "standby lags behind, its rows are ignored" in caplog.text

        standby.execute("SELECT pg_wal_replay_resume()")
        eventually(lambda: (True, True) in kept)
        assert made.ids() == rows


@pytest.mark.needs("postgresql")
def test_the_service_does_not_listen_to_a_standby(
    primary: SystemPostgres, standby: SystemPostgres, reasons: Reasons
) -> None:
    variables = primary.environment | {"DB_LISTEN_PORT": standby.environment["DB_PORT"]}
    with Refreshed(variables, SOON) as made:
        eventually(lambda: "the server is a standby" in reasons())
        assert not listening()
        eventually(made.preferences.held)
        rows = [*made.ids(), add(primary.environment)]
        eventually(lambda: made.ids() == rows)


@pytest.mark.needs("postgresql")
def test_the_service_listens_to_the_primary_of_several_hosts(
    primary: SystemPostgres, standby: SystemPostgres
) -> None:
    ports = f"{standby.environment['DB_PORT']},{primary.environment['DB_PORT']}"
    variables = primary.environment | {"DB_HOST": "127.0.0.1,127.0.0.1", "DB_PORT": ports}
    with Refreshed(variables, LONG) as made:
        wait_until_listening()
        rows = [*made.ids(), add(primary.environment)]
        eventually(lambda: made.ids() == rows)


# --- TLS


@pytest.mark.needs("postgresql")
@pytest.mark.usefixtures("processes")
def test_changes_are_heard_over_tls_and_an_unverified_server_is_refused(
    certificate: tuple[Path, ssl.SSLContext], reasons: Reasons
) -> None:
    with SystemPostgres(Tls(certificate[0])) as server:
        verified = server.environment | {
            "DB_HOST": "localhost",
            "DB_SSLMODE": "verify-full",
            "DB_SSLROOTCERT": str(certificate[0]),
        }
        migrations.migrate(Settings.from_env(verified))
        with Refreshed(verified, LONG) as made:
            wait_until_listening()
            added = add(verified)
            eventually(lambda: made.ids() == [added])
        assert reasons() == set()
        with Refreshed(verified | {"DB_SSLROOTCERT": certifi.where()}, LONG) as made:
            eventually(reasons)
            assert not made.preferences.held()
    assert reasons() == {"tls: the server's certificate is expired or not trusted"}


# --- a pooler


@pytest.fixture
def pooler(database: Environment, request: pytest.FixtureRequest) -> Iterator[Environment]:
    """The `DB_*` variables that connect through a pgbouncer."""
    with PgBouncer(database, request.param) as pooler:
        yield pooler.environment


@pytest.mark.needs("pgbouncer")
@pytest.mark.parametrize("pooler", ["transaction"], indirect=True)
def test_listening_through_a_transaction_pooler_fails_and_the_log_gives_the_remedy(
    pooler: Environment, reasons: Reasons
) -> None:
    """The pooler accepts LISTEN but delivers no notification."""
    with Refreshed(pooler, SOON) as made:
        eventually(lambda: made.ids() == [])
        added = add(pooler)
        eventually(lambda: made.ids() == [added])
        eventually(lambda: any("set DB_LISTEN_HOST" in reason for reason in reasons()))
        assert not listening()


@pytest.mark.needs("pgbouncer")
@pytest.mark.parametrize("pooler", ["session"], indirect=True)
def test_listening_through_a_session_pooler_works(
    pooler: Environment, database: Environment, growth: Growth
) -> None:
    with Refreshed(pooler, LONG) as made, connect(database) as connection:
        wait_until_listening()
        connection.execute(f"NOTIFY {PROBES}")  # another worker's probe
        added = add(pooler)
        eventually(lambda: made.ids() == [added])
        assert growth("preference_notifications_total") == {(): 1}


@pytest.mark.needs("pgbouncer")
@pytest.mark.parametrize("pooler", ["transaction"], indirect=True)
def test_without_a_listener_a_transaction_pooler_is_enough(
    pooler: Environment, reasons: Reasons
) -> None:
    with Refreshed(pooler, SOON, listening=None) as made:
        eventually(made.preferences.held)
        for _ in range(2):
            rows = [*made.ids(), add(pooler)]
            eventually(lambda rows=rows: made.ids() == rows)
    assert reasons() == set()


@pytest.mark.needs("pgbouncer")
@pytest.mark.parametrize("pooler", ["transaction"], indirect=True)
def test_the_service_reads_through_a_pooler_and_listens_past_it(
    pooler: Environment, database: Environment, tmp_path: Path, make_provider: MakeProvider
) -> None:
    provider = make_provider()
    service = Service(tmp_path, pooler | {"DB_LISTEN_PORT": database["DB_PORT"]})
    try:
        service.wait_until_ready().wait_until_listening()
        assert service.notify().status_code == 500
        added = add(database)
        with connect(database) as connection:
            connection.execute(
                "UPDATE notification_preferences SET host = %s WHERE id = %s", (provider.url, added)
            )
        eventually(lambda: service.notify().status_code == 200)
        assert not [line for line in service.lines() if line["message"] == "database error"]
    finally:
        assert service.stop() == 0


def test_a_second_connection_through_a_pooler_that_hangs_is_given_up(
    database: Environment, monkeypatch: pytest.MonkeyPatch, reasons: Reasons
) -> None:
    """A faked process id lets the service detect a pooler and open a second connection."""
    connections: list[Connection] = []
    connect_really = Database.connect
    monkeypatch.setattr(ConnectionInfo, "backend_pid", 1)

    def connect_and_stop(database: Database) -> Connection:
        connections.append(connection := connect_really(database))
        if len(connections) == 2:
            ((process,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
            os.kill(process, signal.SIGSTOP)
            stopped.append(process)
        return connection

    stopped: list[int] = []
    monkeypatch.setattr(Database, "connect", connect_and_stop)
    try:
        with Refreshed(database, LONG) as made:
            eventually(lambda: reasons() == {"the connection broke"})
            eventually(made.preferences.held)
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)
