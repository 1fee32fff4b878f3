"""Connections to real PostgreSQL servers: TLS, rotation, several hosts, time limits, a pooler."""

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from notifier.app import create_app
from notifier.settings import Settings
from notifier.store.db import (
    Connection,
    Database,
    bounded,
    host_of,
    log_fields,
    reason,
    transaction,
)
from tests.certificates import make_certificate
from tests.fixtures import Environment, connect, one_role
from tests.pgbouncer import PgBouncer
from tests.sockets import LOOPBACK, descriptors_left, not_answering, refusing, silent
from tests.system_postgres import SystemPostgres, Tls
from tests.timing import eventually, within

ONE_IS_WRONG = "wrong password, user or DB_SSLCERT"
UNKNOWN_AUTHORITY = "tls: the server's certificate is expired or not trusted"


def database_of(environment: Environment, **variables: str) -> Database:
    return Database(Settings.from_env(environment | variables))


def value(connection: Connection, query: str, *parameters: Any) -> Any:
    """Return a query's only value."""
    ((found,),) = connection.execute(query.encode(), parameters).fetchall()
    return found


def refusal(database: Database) -> str:
    """Return the reason for which connecting fails."""
    with pytest.raises(psycopg.OperationalError) as raised:
        database.connect()
    why = reason(raised.value)
    assert why != "unknown", raised.value
    assert database.username not in why
    return why


# --- TLS


@dataclass(frozen=True)
class Certificates:
    """Self-signed certificates, each its own authority, with the key beside it."""

    server: Path  # for localhost only
    stranger: Path
    client: Path  # in the user's name
    other_client: Path
    unknown_client: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    def make(subject: str) -> Path:
        folder = tmp_path_factory.mktemp("certificate")
        return make_certificate(folder, "DNS:localhost", subject=subject)[0]

    return Certificates(
        server=make("server"),
        stranger=make("stranger"),
        client=make("notifier"),
        other_client=make("mallory"),
        unknown_client=make("notifier"),
    )


@pytest.fixture(scope="module")
def tls_server(processes: None, certificates: Certificates) -> Iterator[Environment]:
    """The `DB_*` variables of a server that requires TLS, set to verify it."""
    with SystemPostgres(Tls(certificates.server)) as server:
        yield server.environment | verified(certificates)


@pytest.fixture(scope="module")
def strict_server(
    processes: None, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    """The same for a server that also requires client certificates."""
    known = tmp_path_factory.mktemp("clients") / "known.pem"
    known.write_bytes(certificates.client.read_bytes() + certificates.other_client.read_bytes())
    with SystemPostgres(Tls(certificates.server, clients=known)) as server:
        yield server.environment | verified(certificates)


def verified(certificates: Certificates) -> Environment:
    return {
        "DB_HOST": "localhost",
        "DB_SSLMODE": "verify-full",
        "DB_SSLROOTCERT": str(certificates.server),
    }


def with_certificate(certificate: Path, key: Path | None = None) -> Environment:
    key = key or certificate.with_name("key.pem")
    return {"DB_SSLCERT": str(certificate), "DB_SSLKEY": str(key)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, with the folder where libpq looks for files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    return tmp_path


@pytest.mark.needs("postgresql")
def test_a_server_is_verified_by_its_authority_and_its_name(tls_server: Environment) -> None:
    with database_of(tls_server).connect() as connection:
        assert value(connection, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


@pytest.mark.needs("postgresql")
def test_a_wrong_host_name_is_refused(tls_server: Environment) -> None:
    database = database_of(tls_server, DB_HOST=LOOPBACK)
    assert refusal(database) == "tls: the server's certificate is for another host"


@pytest.mark.needs("postgresql")
@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
def test_an_unknown_authority_is_refused(
    tls_server: Environment, certificates: Certificates, mode: str
) -> None:
    unknown = str(certificates.stranger)
    database = database_of(tls_server, DB_SSLMODE=mode, DB_SSLROOTCERT=unknown)
    assert refusal(database) == UNKNOWN_AUTHORITY


@pytest.mark.needs("postgresql")
def test_a_server_cannot_be_verified_without_authorities(
    tls_server: Environment, home: Path
) -> None:
    shutil.copy(tls_server["DB_SSLROOTCERT"], home / ".postgresql/root.crt")
    database = database_of(tls_server, DB_SSLROOTCERT="")
    assert refusal(database) == "tls: DB_SSLROOTCERT is missing or is no file of certificates"


@pytest.mark.needs("postgresql")
def test_authorities_are_read_for_each_connection(
    tls_server: Environment, certificates: Certificates, tmp_path: Path
) -> None:
    file = tmp_path / "authorities.pem"
    file.write_bytes(certificates.stranger.read_bytes())
    database = database_of(tls_server, DB_SSLROOTCERT=str(file))
    assert refusal(database) == UNKNOWN_AUTHORITY
    file.unlink()
    assert refusal(database) == "tls: DB_SSLROOTCERT is missing or is no file of certificates"
    file.write_bytes(certificates.server.read_bytes())
    database.connect().close()


@pytest.mark.needs("postgresql")
def test_a_server_that_requires_tls_refuses_plain_connections(tls_server: Environment) -> None:
    database = database_of(tls_server, DB_SSLMODE="disable", DB_SSLROOTCERT="")
    assert refusal(database) == "pg_hba.conf rejects this user from here without tls"


@pytest.mark.parametrize("mode", ["require", "verify-full"])
def test_a_server_without_tls_is_refused_if_tls_is_required(
    database: Environment, certificates: Certificates, mode: str
) -> None:
    authorities = str(certificates.server)
    plain = database_of(database, DB_SSLMODE=mode, DB_SSLROOTCERT=authorities)
    assert refusal(plain) == "tls: the server does not support it"


@pytest.mark.needs("postgresql")
def test_a_client_presents_its_certificate(
    strict_server: Environment, certificates: Certificates
) -> None:
    database = database_of(strict_server | with_certificate(certificates.client))
    with database.connect() as connection:
        query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert value(connection, query) == "/CN=notifier"


@pytest.mark.needs("postgresql")
def test_a_client_without_the_right_certificate_is_refused(
    strict_server: Environment, certificates: Certificates
) -> None:
    wanted = "tls: the server requires a certificate, see DB_SSLCERT"
    assert refusal(database_of(strict_server)) == wanted
    for certificate, why in (
        (certificates.other_client, ONE_IS_WRONG),
        (certificates.unknown_client, "tls: the server does not trust the issuer of DB_SSLCERT"),
    ):
        assert refusal(database_of(strict_server | with_certificate(certificate))) == why


@pytest.mark.needs("postgresql")
def test_a_client_whose_certificate_or_key_cannot_be_used_is_refused(
    strict_server: Environment, certificates: Certificates, tmp_path: Path
) -> None:
    key = certificates.client.with_name("key.pem")
    garbage, readable = tmp_path / "garbage.pem", tmp_path / "readable.pem"
    garbage.write_text("garbage")
    garbage.chmod(0o600)
    readable.write_bytes(key.read_bytes())
    readable.chmod(0o644)
    for wrong_key in (certificates.other_client.with_name("key.pem"), garbage, readable):
        given = with_certificate(certificates.client, wrong_key)
        assert refusal(database_of(strict_server | given)) == "tls: DB_SSLKEY cannot be used"
    given = with_certificate(garbage, key)
    assert refusal(database_of(strict_server | given)) == "tls: DB_SSLCERT cannot be used"


@pytest.mark.needs("postgresql")
@pytest.mark.parametrize("name", ["root.crt", "root.crl", "postgresql.crt"])
def test_libpqs_own_files_have_no_effect(
    tls_server: Environment, certificates: Certificates, home: Path, name: str
) -> None:
    """Of another authority, they would make libpq verify a server that nobody asked to verify."""
    shutil.copy(certificates.stranger, home / ".postgresql" / name)
    database_of(tls_server, DB_SSLMODE="require", DB_SSLROOTCERT="").connect().close()
    if name != "root.crt":
        database_of(tls_server).connect().close()


@pytest.mark.needs("postgresql")
def test_a_client_certificate_in_the_home_directory_is_not_presented(
    strict_server: Environment, certificates: Certificates, home: Path
) -> None:
    shutil.copy(certificates.client, home / ".postgresql/postgresql.crt")
    shutil.copy(certificates.client.with_name("key.pem"), home / ".postgresql/postgresql.key")
    wanted = "tls: the server requires a certificate, see DB_SSLCERT"
    assert refusal(database_of(strict_server)) == wanted


def migrate(environment: Environment) -> tuple[int, str]:
    """Run the command `migrate`; return its exit code and its output on both streams."""
    app = create_app(Settings.from_env(environment))
    result = app.test_cli_runner().invoke(args=["migrate"])
    return result.exit_code, result.output


@pytest.mark.needs("postgresql")
def test_migrate_reports_a_tls_error_in_one_line_and_works_without_one(
    tls_server: Environment, certificates: Certificates
) -> None:
    for wrong, said in (
        ({"DB_SSLROOTCERT": str(certificates.stranger)}, "certificate verify failed"),
        ({"DB_HOST": LOOPBACK}, "does not match host name"),
    ):
        code, output = migrate(tls_server | wrong)
        (line,) = output.splitlines()
        assert (code, line.startswith("Error: PostgreSQL: "), said in line) == (1, True, True)
        assert tls_server["DB_PASSWORD"] not in line
    code, output = migrate(tls_server)
    assert (code, output.splitlines()[0][:12]) == (0, "applied 0001")
    assert migrate(tls_server) == (0, "nothing to apply, the schema is up to date\n")


# --- libpq's environment

# Each would break or change a connection.
LIBPQ = {
    "PGAPPNAME": "somebody else",
    "PGCHANNELBINDING": "require",
    "PGCLIENTENCODING": "nonsense",
    "PGDATESTYLE": "nonsense",
    "PGGSSENCMODE": "require",
    "PGHOSTADDR": "127.0.0.2",
    "PGLOADBALANCEHOSTS": "nonsense",
    "PGMINPROTOCOLVERSION": "nonsense",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGREQUIREAUTH": "none",
    "PGREQUIREPEER": "nobody",
    "PGSERVICE": "nowhere",
    "PGSSLCERTMODE": "nonsense",
    "PGSSLMODE": "require",
    "PGSSLNEGOTIATION": "nonsense",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "Asia/Tokyo",
}


def test_each_variable_of_libpq_that_a_connection_could_read_is_withdrawn(
    database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in psycopg.pq.Conninfo.get_defaults():
        if option.envvar:
            monkeypatch.setenv(option.envvar.decode(), "nonsense")
    database_of(database).connect().close()


@pytest.mark.parametrize("name", LIBPQ)
def test_a_variable_of_libpq_has_no_effect(
    database: Environment, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def seen() -> list[Any]:
        with database_of(database).connect() as connection:
            settings = (
                "search_path",
                "TimeZone",
                "DateStyle",
                "client_encoding",
                "application_name",
            )
            return [value(connection, "SELECT current_setting(%s)", each) for each in settings]

    expected = seen()
    monkeypatch.setenv(name, LIBPQ[name])
    assert seen() == expected


def test_libpqs_files_of_services_and_passwords_have_no_effect(
    database: Environment, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the home directory and in the places that variables name."""
    files = {"PGSERVICEFILE": ".pg_service.conf", "PGPASSFILE": ".pgpass"}
    (home / ".pg_service.conf").write_text("[mine]\nhost=127.0.0.2\n")
    (home / ".pgpass").write_text("*:*:*:*:wrong\n")
    (home / ".pgpass").chmod(0o600)
    for variable, file in files.items():
        monkeypatch.setenv(variable, str(home / file))
    monkeypatch.setenv("PGSERVICE", "mine")
    monkeypatch.setenv("PGSYSCONFDIR", str(home))
    with database_of(database).connect() as connection:
        assert host_of(connection).startswith(LOOPBACK)


def test_commands_ignore_libpqs_variables_too(
    empty_database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in LIBPQ.items():
        monkeypatch.setenv(name, text)
    code, output = migrate(empty_database)
    assert (code, output.splitlines()[0][:12]) == (0, "applied 0001")


# --- rotation


@dataclass(frozen=True)
class Rotation:
    """A role whose password a test can change in the server and in a file."""

    name: str
    file: Path
    admin: Connection

    def set_password(self, text: str) -> None:
        change = sql.SQL("ALTER ROLE {} PASSWORD {}")
        self.admin.execute(change.format(sql.Identifier(self.name), sql.Literal(text)))


@pytest.fixture
def rotation(database: Environment, tmp_path: Path) -> Iterator[Rotation]:
    name = f"rotated_{secrets.token_hex(4)}"
    with connect(database) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        yield Rotation(name, tmp_path / "password", admin)
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.mark.parametrize("variable", ["DB", "DB_MIGRATION"])
def test_the_next_connection_uses_the_new_password_in_the_file(
    database: Environment, rotation: Rotation, variable: str
) -> None:
    rotation.file.write_text("first\n")
    rotation.set_password("first")
    variables = {
        "DB_PASSWORD": "" if variable == "DB" else "unused",
        f"{variable}_USERNAME": rotation.name,
        f"{variable}_PASSWORD_FILE": str(rotation.file),
    }
    settings = Settings.from_env(one_role(database) | variables)
    rotated = Database(settings) if variable == "DB" else Database.migrating(settings)
    with rotated.connect() as connection:
        rotation.set_password("second")
        assert refusal(rotated) == ONE_IS_WRONG
        rotation.file.write_text("second\n")
        rotated.connect().close()
        assert value(connection, "SELECT 1") == 1  # an open connection is kept


@pytest.mark.parametrize("break_it", [Path.unlink, lambda file: file.write_text("\n")])
def test_connecting_fails_only_while_the_password_file_is_unreadable(
    database: Environment, rotation: Rotation, break_it: Callable[[Path], object]
) -> None:
    rotation.set_password("the password")
    rotation.file.write_text("the password")
    variables = {"DB_PASSWORD": "", "DB_PASSWORD_FILE": str(rotation.file)}
    rotated = database_of(database, DB_USERNAME=rotation.name, **variables)
    for _ in range(2):
        break_it(rotation.file)
        assert refusal(rotated) == "the password file cannot be read"
        rotation.file.write_text("the password")
        rotated.connect().close()


# --- several hosts


def hosts(*ports: object) -> Environment:
    """Return the `DB_*` variables for several servers on this machine."""
    return {"DB_HOST": ",".join([LOOPBACK] * len(ports)), "DB_PORT": ",".join(map(str, ports))}


@pytest.mark.parametrize(("trouble", "seconds"), [(refusing, 1), (silent, 4), (not_answering, 4)])
def test_the_first_of_several_hosts_that_answers_is_used(
    database: Environment, trouble: Callable[[], AbstractContextManager[int]], seconds: float
) -> None:
    with trouble() as port, within(seconds):
        several = database_of(database, **hosts(port, database["DB_PORT"]))
        with several.connect() as connection:
            assert value(connection, "SELECT current_database()") == database["DB_NAME"]


def test_a_host_with_an_unknown_name_is_skipped(database: Environment) -> None:
    several = database_of(database, DB_HOST=f"no-such-host.invalid,{LOOPBACK}")
    with several.connect() as connection:
        assert value(connection, "SELECT current_database()") == database["DB_NAME"]


@pytest.mark.needs("postgresql")
def test_a_host_that_accepts_no_connections_is_skipped(database: Environment) -> None:
    owners = one_role(database)
    with SystemPostgres() as other:
        closed = other.environment | {
            "DB_NAME": owners["DB_NAME"],
            "DB_PASSWORD": owners["DB_PASSWORD"],
        }
        other.execute(f"ALTER ROLE {closed['DB_USERNAME']} PASSWORD '{closed['DB_PASSWORD']}'")
        other.execute(f"CREATE DATABASE {closed['DB_NAME']} ALLOW_CONNECTIONS false")
        assert refusal(database_of(closed)) == "PostgreSQL does not accept connections"
        several = database_of(owners, **hosts(closed["DB_PORT"], owners["DB_PORT"]))
        with several.connect() as connection:
            assert str(connection.info.port) == database["DB_PORT"]


def test_connecting_fails_if_no_host_answers(database: Environment) -> None:
    with refusing() as first, refusing() as second:
        assert refusal(database_of(database, **hosts(first, second))) == "refused"
    assert refusal(database_of(database, DB_HOST="no-such-host.invalid")) == "no such host"
    assert refusal(database_of(database, DB_HOST="/no/such/folder")) == "no such socket"


def test_a_host_that_hangs_is_given_two_seconds(database: Environment) -> None:
    with silent() as port, within(4):
        assert refusal(database_of(database, DB_PORT=str(port))) == "no answer in time"


@pytest.mark.needs("postgresql")
@pytest.mark.usefixtures("processes")
def test_a_connection_that_needs_the_primary_skips_a_standby() -> None:
    with SystemPostgres() as primary, primary.standby() as standby:
        ports = [standby.environment["DB_PORT"], primary.environment["DB_PORT"]]
        settings = Settings.from_env(primary.environment | hosts(*ports))
        in_recovery = "SELECT pg_is_in_recovery()"
        for database, is_standby in (
            (Database(settings), True),
            (Database.reading(settings), True),
            (Database(settings, primary=True), False),
            (Database.listening(settings), False),
            (Database.migrating(settings), False),
        ):
            with database.connect() as connection:
                assert value(connection, in_recovery) is is_standby

        only_a_standby = Settings.from_env(standby.environment)
        assert refusal(Database.listening(only_a_standby)) == "the server is a standby"
        with Database(only_a_standby).connect() as connection:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as raised:
                connection.execute("CREATE TABLE t ()")
            assert reason(raised.value) == "the server is a standby"


def test_each_configured_place_and_the_migrating_role_are_used(
    database: Environment,
) -> None:
    """A migration connects where the listener does: neither works through a pooler."""
    owner, _ = Settings.from_env(database).migrating_role
    with refusing() as port:
        settings = Settings.from_env(
            database
            | {
                "DB_PORT": str(port),
                "DB_LISTEN_PORT": database["DB_PORT"],
                "DB_READ_PORT": database["DB_PORT"],
            }
        )
        assert refusal(Database(settings)) == "refused"
        for reached, role in (
            (Database.listening(settings), database["DB_USERNAME"]),
            (Database.reading(settings), database["DB_USERNAME"]),
            (Database.migrating(settings), owner),
        ):
            with reached.connect() as connection:
                assert value(connection, "SELECT current_user") == role
    assert owner != database["DB_USERNAME"]


# --- connections, transactions and reasons


def test_a_connection_has_the_services_name_as_application_name(database: Environment) -> None:
    with (
        connect(database) as watching,
        database_of(database, APP_NAME="notifier-eu").connect() as connection,
    ):
        query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
        assert value(watching, query, connection.info.backend_pid) == "notifier-eu"


def test_a_transaction_sets_the_servers_statement_timeout_until_it_ends(
    database: Environment,
) -> None:
    with database_of(database).connect() as connection:
        limit = "SELECT current_setting('statement_timeout')"
        before = value(connection, limit)
        with transaction(connection, 1.5):
            assert value(connection, limit) == "1500ms"
        assert value(connection, limit) == before == "0"


def test_each_statement_sees_earlier_commits_whatever_the_default_isolation(
    database: Environment,
) -> None:
    name = sql.Identifier(database["DB_NAME"])
    default = "ALTER DATABASE {} SET default_transaction_isolation = 'serializable'"
    with connect(database) as admin:
        admin.execute(sql.SQL(default).format(name))
        with database_of(database).connect() as connection, transaction(connection, 10):
            count = "SELECT count(*) FROM notification_preferences"
            assert value(connection, count) == 0
            admin.execute(
                "INSERT INTO notification_preferences (provider_type, provider_name, host)"
                " VALUES ('Email', 'n', 'http://a/')"
            )
            assert value(connection, count) == 1


def test_the_server_cancels_a_query_that_timed_out(database: Environment) -> None:
    """Without its own limit the server would run the query to its end after we disconnect."""
    with connect(database) as watching, database_of(database).connect() as connection:
        backend = connection.info.backend_pid
        with (
            within(5),
            pytest.raises(psycopg.OperationalError) as raised,
            transaction(connection, 0.3),
        ):
            connection.execute("SELECT pg_sleep(600)")
        assert reason(raised.value) in {"no answer in time", "the connection broke"}
        query = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
        eventually(lambda: value(watching, query, backend) == 0)


def test_a_stopped_server_process_does_not_block_its_client(database: Environment) -> None:
    connection = database_of(database).connect()
    backend = connection.info.backend_pid
    os.kill(backend, signal.SIGSTOP)
    try:
        with within(5), pytest.raises(psycopg.OperationalError) as raised, bounded(connection, 0.3):
            connection.execute("SELECT 1")
    finally:
        os.kill(backend, signal.SIGCONT)
    assert reason(raised.value) == "the connection broke"
    assert connection.broken


@pytest.mark.parametrize("lack", ["descriptor", "thread"])
def test_a_shortage_of_this_machine_is_an_error_with_a_reason(
    database: Environment, monkeypatch: pytest.MonkeyPatch, lack: str
) -> None:
    """Without the time limit, a hung server would block its client for ever."""

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with database_of(database).connect() as connection, ExitStack() as stack:
        if lack == "thread":
            monkeypatch.setattr(threading.Thread, "start", fail)
        else:
            stack.enter_context(descriptors_left(0))
        with pytest.raises(OSError) as raised, bounded(connection, 5):  # noqa: PT011 by its reason
            pass
        monkeypatch.undo()
    why = "this machine has no free descriptor, port, thread or memory"
    assert reason(raised.value) == why


@pytest.mark.parametrize("from_file", [False, True])
def test_a_connection_without_a_free_descriptor_has_a_reason(
    database: Environment, tmp_path: Path, from_file: bool
) -> None:
    described = database_of(database)
    if from_file:
        file = tmp_path / "password"
        file.write_text(database["DB_PASSWORD"])
        described = database_of(database, DB_PASSWORD="", DB_PASSWORD_FILE=str(file))
    with descriptors_left(0):
        why = refusal(described)
    assert why == "this machine has no free descriptor, port, thread or memory"


def test_a_transaction_within_its_time_limit_is_not_interrupted(database: Environment) -> None:
    with database_of(database).connect() as connection:
        for _ in range(3):
            with transaction(connection, 5):
                assert value(connection, "SELECT 1") == 1
        assert not connection.closed


def test_a_reason_names_no_host_no_user_and_no_database(database: Environment) -> None:
    """PostgreSQL's own error texts do, so the log has the reason instead."""
    with pytest.raises(psycopg.OperationalError) as raised:
        database_of(database, DB_USERNAME="nobody-here").connect()
    assert "nobody-here" in str(raised.value)
    assert reason(raised.value) == ONE_IS_WRONG
    assert reason(RuntimeError("about user nobody-here")) == "unknown"


IS_STANDBY = "the server is a standby"
LACKS_PRIVILEGE = "the user lacks a privilege: migrate grants it"
NOT_THERE = "the database, the user or the table does not exist"
NO_ANSWER = "no answer in time"
ENDED = "PostgreSQL ended the connection"

# Errors on an open connection: statements, and the last statement's SQLSTATE and reason.
PROVOKED = [
    ("SELECT FROM no_such_table", "42P01", NOT_THERE),
    ("SELECT no_such_column FROM notification_preferences", "42703", NOT_THERE),
    ("SELECT 'Email'::no_such_type", "42704", NOT_THERE),
    ("SELECT no_such_function()", "42883", NOT_THERE),
    ("SELECT FROM pg_authid", "42501", LACKS_PRIVILEGE),
    ("SET statement_timeout = 50; SELECT pg_sleep(60)", "57014", NO_ANSWER),
    ("SET TRANSACTION READ ONLY; CREATE TABLE mine ()", "25006", IS_STANDBY),
    ("SELECT pg_terminate_backend(pg_backend_pid())", "57P01", ENDED),
]


@pytest.mark.parametrize(("statements", "state", "why"), PROVOKED, ids=lambda value: value[:20])
def test_the_reason_of_a_servers_error_follows_from_its_sqlstate(
    statements: str, state: str, why: str, database: Environment
) -> None:
    with database_of(database).connect() as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute(statements.encode())
    assert (raised.value.sqlstate, reason(raised.value)) == (state, why)


@pytest.mark.parametrize(("state", "why"), [(state, why) for _, state, why in PROVOKED])
def test_the_servers_language_does_not_matter_if_the_error_has_a_sqlstate(
    state: str, why: str, database: Environment
) -> None:
    said = f"DO $$ BEGIN RAISE EXCEPTION 'keine Berechtigung' USING ERRCODE = '{state}'; END $$"
    with database_of(database).connect() as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute(said.encode())
    assert str(raised.value).startswith("keine Berechtigung")
    assert reason(raised.value) == why


# Errors as psycopg raises them: the class decides the reason, or else the text does.
MADE = [
    (errors.AdminShutdown("timeout"), ENDED),
    (errors.CrashShutdown("autre langue"), ENDED),
    (errors.DatabaseDropped("autre langue"), ENDED),
    (errors.IdleSessionTimeout("autre langue"), ENDED),
    (errors.IdleInTransactionSessionTimeout("autre langue"), ENDED),
    (errors.LockNotAvailable("autre langue"), NO_ANSWER),
    (errors.InvalidSchemaName("autre langue"), NOT_THERE),
    (
        errors.ProtocolViolation("server login has been failing"),
        "the pooler cannot reach PostgreSQL",
    ),
    (errors.CannotConnectNow("the database system is shutting down"), "PostgreSQL is stopping"),
    (errors.ConnectionTimeout("connection timeout expired"), NO_ANSWER),
    (psycopg.OperationalError("FATAL:  permission denied for database x"), LACKS_PRIVILEGE),
    (psycopg.OperationalError('FATAL:  database "x" does not exist'), NOT_THERE),
    (psycopg.OperationalError("server is in hot standby mode"), IS_STANDBY),
    (psycopg.OperationalError("FATAL:  autre langue"), "unknown"),
    (errors.UniqueViolation("autre langue"), "unknown"),
    (OSError("Connection refused"), "refused"),
]


@pytest.mark.parametrize(("error", "why"), MADE, ids=repr)
def test_a_sqlstate_takes_precedence_over_the_text(error: Exception, why: str) -> None:
    assert reason(error) == why
    assert log_fields(error, "db.example.com:5432") == {
        "error": type(error).__name__,
        "reason": why,
        "host": "db.example.com:5432",
    }


@pytest.mark.parametrize(
    ("host", "port", "hosts"),
    [
        ("db.example.com", "5432", "db.example.com:5432"),
        ("a, b", "5432", "a:5432,b:5432"),
        ("a,b", "5432,5433", "a:5432,b:5433"),
        ("::1", "5432", "[::1]:5432"),
        ("/run/postgresql", "5432", "/run/postgresql:5432"),
    ],
)
def test_a_log_line_names_the_hosts_that_are_configured(host: str, port: str, hosts: str) -> None:
    environ = {"DB_HOST": host, "DB_PORT": port}
    environ |= {"DB_NAME": "none", "DB_USERNAME": "none", "DB_PASSWORD": "none"}
    assert Database(Settings.from_env(environ)).hosts == hosts


def test_a_log_line_names_the_host_that_is_connected_to(database: Environment) -> None:
    """Of several; the first refuses connections here."""
    host, port = database["DB_HOST"], database["DB_PORT"]
    with refusing() as other:
        several = database_of(database, DB_HOST=f"127.0.0.1,{host}", DB_PORT=f"{other},{port}")
        with several.connect() as connection:
            assert host_of(connection) == f"{host}:{port}"


# --- a pooler


@pytest.fixture
def pooled(database: Environment) -> Iterator[Environment]:
    """The `DB_*` variables of `database` behind a pgbouncer in transaction pooling mode."""
    with PgBouncer(database) as pgbouncer:
        yield pgbouncer.environment


@pytest.mark.needs("pgbouncer")
def test_connections_work_through_a_transaction_pooler(pooled: Environment) -> None:
    """A pooler refuses the start-up parameter `options`; its clients share prepared statements."""
    backends = set()
    for _ in range(3):
        with database_of(pooled).connect() as connection:
            for number in range(8):  # by default psycopg would prepare the sixth
                with transaction(connection, 1.5):
                    assert value(connection, "SELECT %s::int", number) == number
                    backends.add(value(connection, "SELECT pg_backend_pid()"))
    assert len(backends) == 1  # the pooler reuses one session, so leftovers would show


@pytest.mark.needs("pgbouncer")
def test_a_transaction_leaves_no_time_limit_for_the_poolers_next_client(
    pooled: Environment,
) -> None:
    with database_of(pooled).connect() as connection, transaction(connection, 1.5):
        backend = value(connection, "SELECT pg_backend_pid()")
    with database_of(pooled).connect() as connection:
        assert value(connection, "SELECT pg_backend_pid()") == backend
        assert value(connection, "SELECT current_setting('statement_timeout')") == "0"


@pytest.mark.needs("pgbouncer")
def test_a_pooler_is_no_standby_and_passes_on_the_application_name(pooled: Environment) -> None:
    with Database.listening(Settings.from_env(pooled)).connect() as connection:
        assert value(connection, "SELECT current_setting('application_name')") == (
            "notification-service"
        )


@pytest.mark.needs("pgbouncer")
def test_a_poolers_refusal_has_a_reason(
    pooled: Environment, allow_connections: Callable[[str], None]
) -> None:
    """Without PostgreSQL a pooler still accepts connections, and their queries wait."""
    assert refusal(database_of(pooled, DB_PASSWORD="wrong")) == "wrong password or user"
    pooler = database_of(pooled)

    def ask() -> str | None:
        try:
            with pooler.connect() as connection, transaction(connection):
                return None
        except psycopg.OperationalError as error:
            return reason(error)

    allow_connections("false")
    with pooler.connect() as connection, pytest.raises(psycopg.errors.AdminShutdown):
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    with within(4):
        assert ask() == "the connection broke"
    assert ask() == "the pooler cannot reach PostgreSQL"
