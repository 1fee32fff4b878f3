"""How PostgreSQL is reached, on real servers: TLS, rotation, several hosts, limits, a pooler."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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
from tests.sockets import LOOPBACK, not_answering, refusing, silent
from tests.system_postgres import SystemPostgres, Tls
from tests.timing import eventually, within

ONE_IS_WRONG = "password, user or DB_SSLCERT: one is wrong"
UNKNOWN_AUTHORITY = "tls: the server's certificate is expired or of unknown authority"


def database_of(environment: Environment, **variables: str) -> Database:
    return Database(Settings.from_env(environment | variables))


def value(connection: Connection, query: str, *parameters: Any) -> Any:
    """Return the only value that a query has."""
    ((found,),) = connection.execute(query.encode(), parameters).fetchall()
    return found


def refusal(database: Database) -> str:
    """Return the reason why there is no connection."""
    with pytest.raises(psycopg.OperationalError) as raised:
        database.connect()
    why = reason(raised.value)
    assert why != "unknown", raised.value
    assert database.username not in why
    return why


# --- TLS


@dataclass(frozen=True)
class Certificates:
    """Each is self-signed, and so its own authority; the key is beside it."""

    server: Path  # for localhost only
    stranger: Path
    client: Path  # in the name of the user
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
    """The `DB_*` of a server that speaks nothing but TLS, with all that verifying it takes."""
    with SystemPostgres(Tls(certificates.server)) as server:
        yield server.environment | verified(certificates)


@pytest.fixture(scope="module")
def strict_server(
    processes: None, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
    """The same of a server that wants a certificate of its clients too."""
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
def test_without_authorities_a_server_that_is_to_be_verified_is_refused(
    tls_server: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where libpq looks
    database = database_of(tls_server, DB_SSLROOTCERT="")
    assert refusal(database) == "tls: DB_SSLROOTCERT names no file of authorities"


@pytest.mark.needs("postgresql")
def test_authorities_are_read_for_each_connection(
    tls_server: Environment, certificates: Certificates, tmp_path: Path
) -> None:
    file = tmp_path / "authorities.pem"
    file.write_bytes(certificates.stranger.read_bytes())
    database = database_of(tls_server, DB_SSLROOTCERT=str(file))
    assert refusal(database) == UNKNOWN_AUTHORITY
    file.unlink()
    assert refusal(database) == "tls: DB_SSLROOTCERT names no file of authorities"
    file.write_bytes(certificates.server.read_bytes())
    database.connect().close()


@pytest.mark.needs("postgresql")
def test_a_server_that_wants_tls_refuses_to_do_without(tls_server: Environment) -> None:
    database = database_of(tls_server, DB_SSLMODE="disable", DB_SSLROOTCERT="")
    assert refusal(database) == "PostgreSQL admits no such user from here without tls"


@pytest.mark.parametrize("mode", ["require", "verify-full"])
def test_a_server_without_tls_is_refused_where_tls_is_wanted(
    database: Environment, certificates: Certificates, mode: str
) -> None:
    authorities = str(certificates.server)
    plain = database_of(database, DB_SSLMODE=mode, DB_SSLROOTCERT=authorities)
    assert refusal(plain) == "tls: the server has none"


@pytest.mark.needs("postgresql")
def test_a_client_shows_its_certificate(
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
    wanted = "tls: the server wants a certificate, see DB_SSLCERT"
    assert refusal(database_of(strict_server)) == wanted
    for certificate, why in (
        (certificates.other_client, ONE_IS_WRONG),
        (certificates.unknown_client, "tls: the server does not know the authority of DB_SSLCERT"),
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


def migrate(environment: Environment) -> tuple[int, str]:
    """Run the command; return its exit code and what it says, on either stream."""
    app = create_app(Settings.from_env(environment))
    result = app.test_cli_runner().invoke(args=["migrate"])
    return result.exit_code, result.output


@pytest.mark.needs("postgresql")
def test_the_command_to_migrate_says_in_a_line_what_is_wrong_and_works_when_nothing_is(
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


# --- rotation


@dataclass(frozen=True)
class Rotation:
    """A user whose password can be changed, in the server and in a file."""

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
def test_a_password_that_changes_in_its_file_is_used_from_the_next_connection_on(
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
        assert value(connection, "SELECT 1") == 1  # who is connected stays


@pytest.mark.parametrize("break_it", [Path.unlink, lambda file: file.write_text("\n")])
def test_a_password_whose_file_is_away_for_a_while_is_an_error_for_that_while(
    database: Environment, rotation: Rotation, break_it: Callable[[Path], object]
) -> None:
    rotation.set_password("the password")
    rotation.file.write_text("the password")
    variables = {"DB_PASSWORD": "", "DB_PASSWORD_FILE": str(rotation.file)}
    rotated = database_of(database, DB_USERNAME=rotation.name, **variables)
    for _ in range(2):
        break_it(rotation.file)
        assert refusal(rotated) == "password: the file cannot be read"
        rotation.file.write_text("the password")
        rotated.connect().close()


# --- several hosts


def hosts(*ports: object) -> Environment:
    """Return the `DB_*` of several servers on this machine."""
    return {"DB_HOST": ",".join([LOOPBACK] * len(ports)), "DB_PORT": ",".join(map(str, ports))}


@pytest.mark.parametrize(("trouble", "seconds"), [(refusing, 1), (silent, 4), (not_answering, 4)])
def test_of_several_hosts_the_first_that_serves_is_used(
    database: Environment, trouble: Callable[[], AbstractContextManager[int]], seconds: float
) -> None:
    with trouble() as port, within(seconds):
        several = database_of(database, **hosts(port, database["DB_PORT"]))
        with several.connect() as connection:
            assert value(connection, "SELECT current_database()") == database["DB_NAME"]


def test_a_host_whose_name_is_unknown_is_passed_over(database: Environment) -> None:
    several = database_of(database, DB_HOST=f"no-such-host.invalid,{LOOPBACK}")
    with several.connect() as connection:
        assert value(connection, "SELECT current_database()") == database["DB_NAME"]


@pytest.mark.needs("postgresql")
def test_a_host_that_takes_no_connections_is_passed_over(database: Environment) -> None:
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


def test_where_no_host_serves_that_is_an_error(database: Environment) -> None:
    with refusing() as first, refusing() as second:
        assert refusal(database_of(database, **hosts(first, second))) == "refused"
    assert refusal(database_of(database, DB_HOST="no-such-host.invalid")) == "no such host"
    assert refusal(database_of(database, DB_HOST="/no/such/folder")) == "no socket there"


def test_a_host_that_hangs_is_given_two_seconds(database: Environment) -> None:
    with silent() as port, within(4):
        assert refusal(database_of(database, DB_PORT=str(port))) == "no answer in time"


@pytest.mark.needs("postgresql")
@pytest.mark.usefixtures("processes")
def test_who_needs_the_primary_passes_a_standby_over() -> None:
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


def test_each_place_and_the_migrating_role_are_used_where_they_are_set(
    database: Environment,
) -> None:
    """A migration goes the listener's way: a pooler is none for it either."""
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


# --- what a connection is


def test_the_server_knows_a_connection_by_the_services_name(database: Environment) -> None:
    with (
        connect(database) as watching,
        database_of(database, APP_NAME="notifier-eu").connect() as connection,
    ):
        query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
        assert value(watching, query, connection.info.backend_pid) == "notifier-eu"


def test_a_transactions_time_limit_is_the_servers_too_and_ends_with_it(
    database: Environment,
) -> None:
    with database_of(database).connect() as connection:
        limit = "SELECT current_setting('statement_timeout')"
        before = value(connection, limit)
        with transaction(connection, 1.5):
            assert value(connection, limit) == "1500ms"
        assert value(connection, limit) == before == "0"


def test_each_statement_of_a_transaction_sees_what_is_committed_before_it_by_any_default(
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


def test_the_server_gives_up_on_what_we_no_longer_wait_for(database: Environment) -> None:
    """It would not notice that we have left until the query is done."""
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


def test_nobody_waits_for_a_server_process_that_has_stopped(database: Environment) -> None:
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


def test_work_that_is_done_in_time_is_not_ended(database: Environment) -> None:
    with database_of(database).connect() as connection:
        for _ in range(3):
            with transaction(connection, 5):
                assert value(connection, "SELECT 1") == 1
        assert not connection.closed


def test_a_reason_names_no_host_no_user_and_no_database(database: Environment) -> None:
    """An error's own words do; the log has the reason instead."""
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

# What the service may meet once it is connected: statements, SQLSTATE and reason of the last one.
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
def test_what_a_server_refuses_is_told_by_its_sqlstate(
    statements: str, state: str, why: str, database: Environment
) -> None:
    with database_of(database).connect() as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute(statements.encode())
    assert (raised.value.sqlstate, reason(raised.value)) == (state, why)


@pytest.mark.parametrize(("state", "why"), [(state, why) for _, state, why in PROVOKED])
def test_the_language_of_the_server_does_not_matter_where_there_is_a_sqlstate(
    state: str, why: str, database: Environment
) -> None:
    said = f"DO $$ BEGIN RAISE EXCEPTION 'keine Berechtigung' USING ERRCODE = '{state}'; END $$"
    with database_of(database).connect() as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute(said.encode())
    assert str(raised.value).startswith("keine Berechtigung")
    assert reason(raised.value) == why


# Errors as psycopg makes them, with what makes the difference: the class, or else the text.
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
def test_a_reason_is_told_by_sqlstate_before_text(error: Exception, why: str) -> None:
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
    """The `DB_*` of `database` by way of a pgbouncer that pools transactions."""
    with PgBouncer(database) as pgbouncer:
        yield pgbouncer.environment


@pytest.mark.needs("pgbouncer")
def test_a_pooler_of_transactions_can_be_between(pooled: Environment) -> None:
    """It takes no `options` at the start, and its connections share what is prepared."""
    backends = set()
    for _ in range(3):
        with database_of(pooled).connect() as connection:
            for number in range(8):  # by default psycopg would prepare from the sixth on
                with transaction(connection, 1.5):
                    assert value(connection, "SELECT %s::int", number) == number
                    backends.add(value(connection, "SELECT pg_backend_pid()"))
    assert len(backends) == 1  # the pooler hands the same one on: what is left on it would be seen


@pytest.mark.needs("pgbouncer")
def test_a_transaction_leaves_no_time_limit_to_the_poolers_next_client(
    pooled: Environment,
) -> None:
    with database_of(pooled).connect() as connection, transaction(connection, 1.5):
        backend = value(connection, "SELECT pg_backend_pid()")
    with database_of(pooled).connect() as connection:
        assert value(connection, "SELECT pg_backend_pid()") == backend
        assert value(connection, "SELECT current_setting('statement_timeout')") == "0"


@pytest.mark.needs("pgbouncer")
def test_a_pooler_is_no_standby_and_tells_who_connects(pooled: Environment) -> None:
    with Database.listening(Settings.from_env(pooled)).connect() as connection:
        assert value(connection, "SELECT current_setting('application_name')") == (
            "notification-service"
        )


@pytest.mark.needs("pgbouncer")
def test_a_pooler_that_refuses_says_why(
    pooled: Environment, allow_connections: Callable[[str], None]
) -> None:
    """Without PostgreSQL it still takes connections, and lets what is asked of them wait."""
    assert refusal(database_of(pooled, DB_PASSWORD="wrong")) == "password or user: one is wrong"
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
