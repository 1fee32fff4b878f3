"""When the refresher reloads the preferences, with a real PostgreSQL that notifies and fails."""

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from notifier.app import build
from notifier.models import Channel
from notifier.settings import Settings
from notifier.store import migrations, refresher
from notifier.store.db import DATABASE_WAIT, Connection, Database
from notifier.store.preferences import CHANGES, Preferences
from notifier.store.refresher import LONGEST_PAUSE, SHORTEST_PAUSE, SPACING
from tests.fixtures import Environment, Growth, MakeSettings, connect
from tests.refreshed import NAME, Refreshed, listening, refreshers, wait_until_listening
from tests.sockets import LOOPBACK, refusing, silent
from tests.timing import eventually, within

AddProvider = Callable[..., int]

LONG = 600.0
SOON = 1.0
STEADY = 3.0  # seconds; the cache is replaced at least 0.6 s before it expires
Make = Callable[..., Refreshed]


@pytest.fixture
def make(database: Environment) -> Iterator[Make]:
    """Start a refresher on `database`; a test may replace its places and variables."""
    with ExitStack() as stack:

        def start(lifetime: float = LONG, *, variables: Any = (), **places: Any) -> Refreshed:
            return stack.enter_context(Refreshed(database | dict(variables), lifetime, **places))

        yield start


@pytest.fixture
def execute(database: Environment) -> Callable[..., None]:
    """Run a statement on `database` as its owner."""

    def run(statement: Any, parameters: Any = ()) -> None:
        with connect(database) as connection:
            connection.execute(statement, parameters)

    return run


Execute = Callable[..., None]


@pytest.fixture
def without_triggers(execute: Execute) -> None:
    """Disable the triggers, so that no change is notified."""
    execute("ALTER TABLE notification_preferences DISABLE TRIGGER USER")


def listeners(database: Environment) -> list[int]:
    """Return the ids of the server processes that work for a refresher."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = %s"
    with connect(database) as connection:
        rows = connection.execute(query, (NAME, database["DB_NAME"])).fetchall()
    return [process for (process,) in rows]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the heartbeat and the backoff, which take seconds in production."""
    monkeypatch.setattr(refresher, "HEARTBEAT", 0.2)
    monkeypatch.setattr(refresher, "LONGEST_PAUSE", 0.2)


# --- changes


def test_the_preferences_are_read_at_the_start_without_any_look_up(
    make: Make, add_provider: AddProvider
) -> None:
    email, push = add_provider("http://a/"), add_provider("http://b/", "PushNotification")
    made = make()
    eventually(lambda: (made.ids(), made.ids(Channel.PUSH)) == ([email], [push]))


def test_every_kind_of_change_is_seen(
    make: Make, add_provider: AddProvider, execute: Execute
) -> None:
    made = make()
    wait_until_listening()
    first, second = add_provider("http://a/", priority=1), add_provider("http://b/", priority=2)
    eventually(lambda: made.ids() == [first, second])
    execute("UPDATE notification_preferences SET priority = 0 WHERE id = %s", (second,))
    eventually(lambda: made.ids() == [second, first])
    execute("UPDATE notification_preferences SET deleted_at = now() WHERE id = %s", (first,))
    eventually(lambda: made.ids() == [second])
    execute("UPDATE notification_preferences SET provider_type = 'PushNotification'")
    eventually(lambda: made.ids() == [] and len(made.ids(Channel.PUSH)) == 1)
    execute("DELETE FROM notification_preferences")
    eventually(lambda: made.ids(Channel.PUSH) == [])
    third = add_provider("http://c/")
    eventually(lambda: made.ids() == [third])
    execute("TRUNCATE notification_preferences")
    eventually(lambda: made.ids() == [])


@contextmanager
def notified(database: Environment) -> Iterator[list[str]]:
    """Yield a list that holds, after the block, the payloads of all its notifications."""
    payloads: list[str] = []
    with connect(database) as connection:
        connection.execute(f"LISTEN {CHANGES}; LISTEN the_end")
        yield payloads
        connection.execute("NOTIFY the_end")  # arrives after what was committed before
        for notification in connection.notifies(timeout=10):
            if notification.channel == "the_end":
                payloads.sort()
                return
            payloads.append(notification.payload)
    pytest.fail("the last notification did not arrive")


@pytest.mark.parametrize(
    ("statement", "channels"),
    [
        ("INSERT INTO {} (provider_type, provider_name, host) VALUES ('Email', 'n', 'h')", "E"),
        ("UPDATE {} SET host = 'x' WHERE provider_type = 'PushNotification'", "P"),
        ("UPDATE {} SET provider_type = 'Email'", "EP"),
        ("UPDATE {} SET provider_type = 'Email' WHERE provider_type <> 'Email'", "EP"),
        ("DELETE FROM {} WHERE provider_type = 'Email'", "E"),
        ("DELETE FROM {} WHERE false", ""),
        ("TRUNCATE {}", "EP"),
    ],
)
def test_the_trigger_notifies_once_of_each_channel_that_changed(
    database: Environment, add_provider: AddProvider, statement: str, channels: str
) -> None:
    """Also if several of its rows changed, and with any search_path."""
    for channel in (*Channel, *Channel):
        add_provider("http://a/", channel)
    names = {"E": "Email", "P": "PushNotification"}
    with notified(database) as payloads, connect(database) as other:
        other.execute("SET search_path = pg_catalog")
        other.execute(statement.format("public.notification_preferences"))
    assert payloads == [names[letter] for letter in channels]


def test_a_change_that_is_rolled_back_is_not_notified(
    database: Environment, execute: Execute
) -> None:
    with notified(database) as payloads:
        execute("BEGIN; TRUNCATE notification_preferences; ROLLBACK")
    assert payloads == []


def test_notifications_are_counted(
    make: Make, add_provider: AddProvider, execute: Execute, growth: Growth
) -> None:
    make()
    wait_until_listening()
    add_provider("http://a/")
    eventually(lambda: growth("preference_notifications_total") == {(): 1})
    execute(
        "UPDATE notification_preferences SET provider_type = 'PushNotification'"
    )  # notifies twice
    eventually(lambda: growth("preference_notifications_total") == {(): 3})


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which reloads began."""
    times: list[float] = []
    reload = Preferences.reload

    def note(preferences: Preferences, connection: Connection) -> bool:
        times.append(time.monotonic())
        return reload(preferences, connection)

    monkeypatch.setattr(Preferences, "reload", note)
    return times


def test_a_burst_of_changes_is_read_with_pauses_between_the_reloads(
    make: Make, database: Environment, began: list[float]
) -> None:
    made = make()
    wait_until_listening()
    began.clear()
    with connect(database) as connection:
        for _ in range(300):  # each in its own transaction
            connection.execute(
                "INSERT INTO notification_preferences (provider_type, provider_name, host)"
                " VALUES ('Email', 'n', 'http://a/')"
            )
    eventually(lambda: len(made.ids()) == 300)
    assert len(began) > 1
    assert all(later - earlier >= SPACING for earlier, later in pairwise(began))


def test_a_migration_notifies_of_rows_that_came_with_the_table(
    make: Make, add_provider: AddProvider, execute: Execute, database: Environment
) -> None:
    """A backup restores the rows before the triggers."""
    made = make()
    wait_until_listening()
    execute("ALTER TABLE notification_preferences DISABLE TRIGGER USER")
    added = add_provider("http://a/")
    execute("ALTER TABLE notification_preferences ENABLE TRIGGER USER")
    assert made.ids() == []
    migrations.migrate(Settings.from_env(database))
    eventually(lambda: made.ids() == [added])


# --- changes that must not be missed


def test_a_change_right_after_the_first_read_is_heard(
    make: Make, add_provider: AddProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading first and listening afterwards would miss it for good."""
    reload = Preferences.reload
    added: list[int] = []

    def then_change(preferences: Preferences, connection: Connection) -> bool:
        kept = reload(preferences, connection)
        if not added:
            added.append(add_provider("http://a/"))
        return kept

    monkeypatch.setattr(Preferences, "reload", then_change)
    made = make()
    eventually(lambda: added and made.ids() == added)


def test_a_change_that_is_notified_during_a_reload_is_read_afterwards(
    make: Make, add_provider: AddProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives with the query's answer, and the connection is silent afterwards."""
    made = make()
    wait_until_listening()
    reload = Preferences.reload
    added: list[int] = []  # during the reload that reads the first

    def then_change(preferences: Preferences, connection: Connection) -> bool:
        kept = reload(preferences, connection)
        if not added:
            added.append(add_provider("http://b/"))
            connection.execute("SELECT 1")
        return kept

    monkeypatch.setattr(Preferences, "reload", then_change)
    first = add_provider("http://a/")
    eventually(lambda: added and made.ids() == [first, *added])


@pytest.mark.usefixtures("quick")
def test_a_change_during_a_lost_connection_is_read_at_the_reconnect(
    make: Make,
    database: Environment,
    allow_connections: Callable[[str], None],
    growth: Growth,
) -> None:
    made = make()
    wait_until_listening()
    (before,) = listeners(database)
    serving = Database(Settings.from_env(database))  # a role may end its own connections
    with connect(database) as connection, serving.connect() as ending:
        allow_connections("false")
        ending.execute("SELECT pg_terminate_backend(%s)", (before,))
        eventually(lambda: not listening())
        connection.execute(
            "INSERT INTO notification_preferences (provider_type, provider_name, host)"
            " VALUES ('Email', 'n', 'http://a/')"
        )
    assert made.ids() == []
    allow_connections("true")
    eventually(lambda: len(made.ids()) == 1)
    wait_until_listening()
    assert growth("preference_listener_reconnects_total")[()] >= 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("idle", [True, False], ids=["idle", "at a change"])
def test_a_connection_whose_server_process_stops_is_replaced(
    make: Make, add_provider: AddProvider, database: Environment, *, idle: bool
) -> None:
    """The connection stays open, and the server's kernel acknowledges all that is sent."""
    made = make()
    wait_until_listening()
    (stopped,) = listeners(database)
    os.kill(stopped, signal.SIGSTOP)
    try:
        added = [] if idle else [add_provider("http://a/")]
        with within(DATABASE_WAIT + 8):
            eventually(lambda: set(listeners(database)) - {stopped})
            wait_until_listening()
            eventually(lambda: made.ids() == added)
    finally:
        os.kill(stopped, signal.SIGCONT)
    eventually(lambda: len(listeners(database)) == 1)


@pytest.mark.usefixtures("quick")
def test_a_failed_reload_keeps_the_cache_and_is_repeated_at_the_reconnect(
    make: Make, add_provider: AddProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add_provider("http://a/")
    made = make()
    eventually(lambda: made.ids() == [first])
    failing, failed = threading.Event(), threading.Event()
    failing.set()
    reload = Preferences.reload

    def fail(preferences: Preferences, connection: Connection) -> bool:
        if failing.is_set():
            failed.set()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return reload(preferences, connection)

    monkeypatch.setattr(Preferences, "reload", fail)
    second = add_provider("http://b/")
    assert failed.wait(10)
    assert made.ids() == [first]
    failing.clear()
    eventually(lambda: made.ids() == [first, second])


# --- reloads before the cache expires


def test_without_a_listener_changes_are_read_in_time_and_no_connection_stays_open(
    make: Make, add_provider: AddProvider, database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    first, push = add_provider("http://a/"), add_provider("http://b/", "PushNotification")
    made = make(STEADY, listening=None)
    eventually(lambda: made.ids() == [first])
    eventually(lambda: listeners(database) == [])
    second = add_provider("http://c/")
    eventually(lambda: made.ids() == [first, second])
    eventually(lambda: listeners(database) == [])
    assert made.ids(Channel.PUSH) == [push]
    assert not listening()
    assert "expired" not in caplog.text


def test_without_a_listener_a_channel_without_a_provider_is_reloaded_soon(
    make: Make, add_provider: AddProvider
) -> None:
    made = make(LONG, listening=None)
    eventually(lambda: made.ids() == [])
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])


def test_a_listener_does_not_poll_for_the_first_provider_of_a_channel(make: Make) -> None:
    made = make(LONG)
    wait_until_listening()
    assert made.preferences.lacking()
    assert made.refresher._reloads.at > time.monotonic() + LONG / 2


def test_the_cache_never_expires_while_postgresql_is_reachable(
    make: Make, add_provider: AddProvider, caplog: pytest.LogCaptureFixture
) -> None:
    for channel in Channel:
        add_provider("http://a/", channel)
    made = make(STEADY)
    eventually(made.preferences.held)
    give_up = time.monotonic() + 2 * STEADY
    while time.monotonic() < give_up:
        assert len(made.ids()) == 1
        time.sleep(0.01)
    assert "expired" not in caplog.text


def test_the_cache_is_reloaded_before_it_expires_even_if_the_listener_cannot_connect(
    make: Make, add_provider: AddProvider, database: Environment
) -> None:
    """The listener may connect elsewhere, past a pooler."""
    with refusing() as port:
        elsewhere = Settings.from_env(database | {"DB_LISTEN_PORT": str(port)})
        made = make(SOON, listening=Database.listening(elsewhere))
        eventually(lambda: made.ids() == [])
        added = add_provider("http://a/")
        eventually(lambda: made.ids() == [added])
        assert not listening()


# --- a replica


class Replica(Database):
    """A database that counts its connections and refuses them while `away` is set."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(Settings.from_env(environment | {"APP_NAME": NAME}))
        self.asked = 0
        self.away = False

    def connect(self) -> Connection:
        self.asked += 1
        if self.away:
            raise psycopg.OperationalError("Connection refused")
        return super().connect()


@pytest.fixture
def replica(database: Environment) -> Replica:
    return Replica(database)


@pytest.mark.usefixtures("without_triggers")
def test_a_listener_also_reloads_before_expiry_and_over_its_own_connection(
    make: Make, add_provider: AddProvider, replica: Replica
) -> None:
    made = make(SOON, database=replica)
    wait_until_listening()
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])
    assert replica.asked == 0


def test_without_a_pooler_one_connection_is_enough_to_listen(make: Make, replica: Replica) -> None:
    make(LONG, listening=replica)
    wait_until_listening()
    assert replica.asked == 1


def test_a_replica_is_read_before_expiry_but_not_at_a_change(
    make: Make, add_provider: AddProvider, replica: Replica
) -> None:
    made = make(LONG, replica=replica)
    wait_until_listening()
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])
    assert replica.asked == 0
    make(SOON, replica=replica)
    eventually(lambda: replica.asked > 2)


@pytest.mark.usefixtures("without_triggers")
@pytest.mark.parametrize("with_listener", [True, False])
def test_the_primary_is_read_if_the_replica_is_unreachable_or_behind(
    make: Make,
    add_provider: AddProvider,
    replica: Replica,
    monkeypatch: pytest.MonkeyPatch,
    *,
    with_listener: bool,
) -> None:
    places = {"replica": replica} | ({} if with_listener else {"listening": None})
    replica.away = True
    made = make(SOON, **places)
    eventually(lambda: made.ids() == [])
    added = [add_provider("http://a/")]
    eventually(lambda: made.ids() == added)

    monkeypatch.setattr(Preferences, "reload", behind_on(replica, Preferences.reload))
    replica.away = False
    asked = replica.asked
    added.append(add_provider("http://b/"))
    eventually(lambda: made.ids() == added)
    eventually(lambda: replica.asked > asked)


def test_a_failing_replica_does_not_disturb_the_listener(
    make: Make, replica: Replica, monkeypatch: pytest.MonkeyPatch, growth: Growth
) -> None:
    failed: list[float] = []

    def fail() -> Connection:
        failed.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(replica, "connect", fail)
    make(SOON, replica=replica)
    eventually(lambda: len(failed) > 2)
    assert listening()
    assert growth("preference_listener_reconnects_total") == {}


@pytest.mark.parametrize(("port", "is_asked"), [(None, False), ("1", False), ("2", True)])
def test_there_is_a_replica_only_if_another_place_is_configured(
    make_settings: MakeSettings, port: str | None, *, is_asked: bool
) -> None:
    notifier = build(make_settings(db_port="1", db_read_port=port))
    assert (notifier.refresher._replica is not None) is is_asked
    notifier.close()


def behind_on(replica: Replica, reload: Any) -> Any:
    """Return a `reload` that drops the rows of the replica, as if it lagged behind."""
    connections: list[Connection] = []
    connect_really = replica.connect

    def connect_and_note() -> Connection:
        connections.append(connect_really())
        return connections[-1]

    replica.connect = connect_and_note  # type: ignore[method-assign]

    def keep_unless_from_replica(preferences: Preferences, connection: Connection) -> bool:
        return connection not in connections and reload(preferences, connection)

    return keep_unless_from_replica


def test_a_failing_replica_is_retried_with_backoff(
    make: Make, replica: Replica, began: list[float]
) -> None:
    """While the refresher waits for a hung replica, it hears of no change."""
    replica.away = True
    make(SOON, replica=replica)
    eventually(lambda: len(began) >= 9)
    assert 2 <= replica.asked <= 5


# --- faults


def test_the_backoff_doubles_with_each_failure_up_to_half_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    chances: list[tuple[float, float]] = []
    monkeypatch.setattr(refresher, "_jitter", lambda *bounds: chances.append(bounds) or 1.0)
    attempts = refresher._Backoff()
    assert attempts.due()
    for _ in range(2):
        for pause in (0.5, 1, 2, 4, 8, 16, 30, 30):
            attempts.fail()
            now += pause - 0.001
            assert not attempts.due()
            now += 0.002
            assert attempts.due()
        attempts.succeed(now + LONG)
        assert not attempts.due()
    assert set(chances) == {(0.5, 1.0)}
    assert (SHORTEST_PAUSE, LONGEST_PAUSE) == (0.5, 30.0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The backoff after each failure, without jitter."""
    noted: list[float] = []
    monkeypatch.setattr(refresher, "_jitter", lambda _, high: high)
    fail = refresher._Backoff.fail

    def note(attempts: Any) -> None:
        fail(attempts)
        noted.append(round(attempts.at - time.monotonic(), 1))

    monkeypatch.setattr(refresher._Backoff, "fail", note)
    return noted


def test_a_connection_that_may_not_read_the_table_is_one_failure(
    make: Make, execute: Execute, pauses: list[float]
) -> None:
    """Reloads before expiry fail as well, with their own backoff."""
    execute("REVOKE SELECT ON notification_preferences FROM notifier_service")
    make()
    eventually(lambda: len(pauses) >= 6)
    assert sorted(pauses[:6]) == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_a_pause_begins_at_the_end_of_the_attempt(make: Make, pauses: list[float]) -> None:
    with silent() as port:
        make(variables={"DB_HOST": LOOPBACK, "DB_PORT": str(port)}.items())
        eventually(lambda: len(pauses) >= 3)
    assert pauses[:3] in ([0.5, 0.5, 1.0], [0.5, 1.0, 0.5])


@pytest.mark.parametrize("hanging", [refusing, silent])
def test_an_unreachable_server_costs_few_attempts_and_log_lines(
    make: Make, hanging: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with hanging() as port:
        made = make(variables={"DB_HOST": LOOPBACK, "DB_PORT": str(port)}.items())
        eventually(lambda: len(errors(caplog)) >= 2)
        assert not made.preferences.held()
        assert {record.__dict__["reason"] for record in errors(caplog)} <= {
            "refused",
            "no answer in time",
        }
        assert {record.__dict__["host"] for record in errors(caplog)} == {f"{LOOPBACK}:{port}"}
        time.sleep(1)  # a loop without a pause would log more
        assert len(errors(caplog)) <= 8


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.ERROR]


def test_a_lost_connection_is_logged_with_its_host_and_not_with_all_that_are_configured(
    make: Make, database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = database["DB_HOST"], database["DB_PORT"]
    with refusing() as other:
        make(variables={"DB_HOST": f"{host},{host}", "DB_PORT": f"{other},{port}"}.items())
        wait_until_listening()
        with Database(Settings.from_env(database)).connect() as ending:
            ending.execute("SELECT pg_terminate_backend(%s)", listeners(database))
        eventually(lambda: errors(caplog))
    assert errors(caplog)[0].__dict__["host"] == f"{host}:{port}"


@pytest.mark.parametrize("listening", [True, False])
def test_where_no_host_can_be_connected_to_the_line_names_all_that_are_configured(
    make: Make, caplog: pytest.LogCaptureFixture, *, listening: bool
) -> None:
    with refusing() as first, refusing() as second:
        several = {"DB_HOST": f"{LOOPBACK},{LOOPBACK}", "DB_PORT": f"{first},{second}"}
        make(variables=several.items(), **({} if listening else {"listening": None}))
        eventually(lambda: len(errors(caplog)) >= 2)
    expected = f"{LOOPBACK}:{first},{LOOPBACK}:{second}"
    assert {record.__dict__["host"] for record in errors(caplog)} == {expected}


def test_a_lost_connection_is_replaced_soon_however_often_that_happens(
    make: Make, database: Environment, growth: Growth
) -> None:
    make()
    with within(10), Database(Settings.from_env(database)).connect() as ending:
        for times in range(1, 5):
            wait_until_listening()
            eventually(lambda: len(listeners(database)) == 1)
            ending.execute("SELECT pg_terminate_backend(%s)", listeners(database))
            again = {(): times}
            eventually(lambda n=again: growth("preference_listener_reconnects_total") == n)
        wait_until_listening()


def test_after_losing_the_listener_a_channel_without_a_provider_is_reloaded_soon(
    make: Make, add_provider: AddProvider, replica: Replica, database: Environment
) -> None:
    made = make(LONG, listening=replica)
    wait_until_listening()
    (process,) = listeners(database)
    replica.away = True
    with Database(Settings.from_env(database)).connect() as ending:
        ending.execute("SELECT pg_terminate_backend(%s)", (process,))
    eventually(lambda: not listening())
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])


def test_a_connection_whose_server_process_stops_before_listen_is_replaced(
    make: Make, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[int] = []
    connect_really = replica.connect

    def connect_and_stop() -> Connection:
        connection = connect_really()
        if not stopped:
            stopped.append(connection.info.backend_pid)
            os.kill(stopped[0], signal.SIGSTOP)
        return connection

    monkeypatch.setattr(replica, "connect", connect_and_stop)
    try:
        make(LONG, listening=replica)
        with within(DATABASE_WAIT + 8):
            wait_until_listening()
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)


@pytest.mark.usefixtures("quick")
def test_an_unexpected_error_is_logged_and_retried(
    make: Make,
    add_provider: AddProvider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reload = Preferences.reload
    failures = iter([ZeroDivisionError(), ZeroDivisionError()])

    def fail_twice(preferences: Preferences, connection: Connection) -> bool:
        for failure in failures:
            raise failure
        return reload(preferences, connection)

    monkeypatch.setattr(Preferences, "reload", fail_twice)
    made = make()
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])
    assert [record.msg for record in errors(caplog)] == ["could not refresh the preferences"] * 2


def test_a_closed_refresher_leaves_no_thread_connection_or_file(
    make: Make, database: Environment
) -> None:
    eventually(lambda: not refreshers())  # of earlier tests
    before = open_files()
    made = make()
    wait_until_listening()
    with within(1):
        made.refresher.close()
    assert refreshers() == 0
    assert open_files() <= before
    assert not listening()
    eventually(lambda: listeners(database) == [])
    made.refresher.close()


def open_files() -> set[tuple[int, int, int]]:
    """Return the open files of this process. Those of earlier tests may close at any time."""
    opened = set()
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):  # the listing's own descriptor is closed by now
            status = os.fstat(int(entry.name))
            opened.add((int(entry.name), status.st_dev, status.st_ino))
    return opened


def test_a_refresher_that_never_started_can_be_closed(database: Environment) -> None:
    before = open_files()
    Refreshed(database, LONG).refresher.close()
    assert open_files() <= before


def test_closing_leaves_a_hung_thread_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Preferences, connection: Connection) -> bool:
        hangs.set()
        return goes_on.wait(20)

    monkeypatch.setattr(Preferences, "reload", hang)
    monkeypatch.setattr(refresher, "DATABASE_WAIT", 0.5)
    eventually(lambda: not refreshers())  # of earlier tests
    made = make()
    assert hangs.wait(10)
    with within(5):
        made.refresher.close()
    assert refreshers() == 1
    goes_on.set()
    eventually(lambda: refreshers() == 0)
