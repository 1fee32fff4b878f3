"""When the preferences are read again: with a real PostgreSQL, its notifications and its faults."""

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
STEADY = 3.0  # what is held is replaced at least 0.6 s before it expires
Make = Callable[..., Refreshed]


@pytest.fixture
def make(database: Environment) -> Iterator[Make]:
    """Start a refresher on `database`; places and variables may be others."""
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
def untold(execute: Execute) -> None:
    """Nobody is told of changes."""
    execute("ALTER TABLE notification_preferences DISABLE TRIGGER USER")


def listeners(database: Environment) -> list[int]:
    """The server's processes that work for a refresher."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = %s"
    with connect(database) as connection:
        rows = connection.execute(query, (NAME, database["DB_NAME"])).fetchall()
    return [process for (process,) in rows]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice and repair within moments what takes seconds in production."""
    monkeypatch.setattr(refresher, "HEARTBEAT", 0.2)
    monkeypatch.setattr(refresher, "LONGEST_PAUSE", 0.2)


# --- changes


def test_the_preferences_are_read_at_the_start_without_anyone_asking(
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
def told(database: Environment) -> Iterator[list[str]]:
    """Yield a list that has, after the block, what was told by then."""
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
    pytest.fail("the end was not told")


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
def test_the_trigger_tells_each_channel_that_changed_once(
    database: Environment, add_provider: AddProvider, statement: str, channels: str
) -> None:
    """Also if several rows of it changed, and wherever the session looks for names."""
    for channel in (*Channel, *Channel):
        add_provider("http://a/", channel)
    names = {"E": "Email", "P": "PushNotification"}
    with told(database) as payloads, connect(database) as other:
        other.execute("SET search_path = pg_catalog")
        other.execute(statement.format("public.notification_preferences"))
    assert payloads == [names[letter] for letter in channels]


def test_what_is_rolled_back_is_not_told(database: Environment, execute: Execute) -> None:
    with told(database) as payloads:
        execute("BEGIN; TRUNCATE notification_preferences; ROLLBACK")
    assert payloads == []


def test_notifications_are_counted(
    make: Make, add_provider: AddProvider, execute: Execute, growth: Growth
) -> None:
    make()
    wait_until_listening()
    add_provider("http://a/")
    eventually(lambda: growth("preference_notifications_total") == {(): 1})
    execute("UPDATE notification_preferences SET provider_type = 'PushNotification'")  # tells both
    eventually(lambda: growth("preference_notifications_total") == {(): 3})


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each reading began."""
    times: list[float] = []
    reload = Preferences.reload

    def note(preferences: Preferences, connection: Connection) -> bool:
        times.append(time.monotonic())
        return reload(preferences, connection)

    monkeypatch.setattr(Preferences, "reload", note)
    return times


def test_many_changes_one_after_the_other_are_read_with_a_pause_between(
    make: Make, database: Environment, began: list[float]
) -> None:
    made = make()
    wait_until_listening()
    began.clear()
    with connect(database) as connection:
        for _ in range(300):  # each a transaction of its own
            connection.execute(
                "INSERT INTO notification_preferences (provider_type, provider_name, host)"
                " VALUES ('Email', 'n', 'http://a/')"
            )
    eventually(lambda: len(made.ids()) == 300)
    assert len(began) > 1
    assert all(later - earlier >= SPACING for earlier, later in pairwise(began))


def test_a_migration_lets_what_came_with_the_table_be_seen(
    make: Make, add_provider: AddProvider, execute: Execute, database: Environment
) -> None:
    """A backup brings the rows before the triggers."""
    made = make()
    wait_until_listening()
    execute("ALTER TABLE notification_preferences DISABLE TRIGGER USER")
    added = add_provider("http://a/")
    execute("ALTER TABLE notification_preferences ENABLE TRIGGER USER")
    assert made.ids() == []
    migrations.migrate(Settings.from_env(database))
    eventually(lambda: made.ids() == [added])


# --- what must not be missed


def test_a_change_right_after_the_first_read_is_heard(
    make: Make, add_provider: AddProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading first and listening then would miss it for good."""
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


def test_a_change_that_is_told_while_it_reads_is_heard_afterwards(
    make: Make, add_provider: AddProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives with the answers to the query, and nothing more comes on the connection then."""
    made = make()
    wait_until_listening()
    reload = Preferences.reload
    added: list[int] = []  # while it reads the first

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
def test_what_changed_while_nobody_listened_is_seen_at_the_reconnect(
    make: Make,
    database: Environment,
    allow_connections: Callable[[str], None],
    growth: Growth,
) -> None:
    made = make()
    wait_until_listening()
    (before,) = listeners(database)
    serving = Database(Settings.from_env(database))  # who may end what it has begun
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
def test_a_server_process_that_stops_is_given_up_and_replaced(
    make: Make, add_provider: AddProvider, database: Environment, *, idle: bool
) -> None:
    """Its connection stays open, and its kernel acknowledges all that is sent."""
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
def test_a_change_whose_reading_fails_leaves_what_is_held_and_is_read_at_the_reconnect(
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


# --- by the time


def test_without_a_listener_changes_are_seen_in_time_and_no_connection_is_held(
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


def test_without_a_listener_a_channel_without_a_provider_is_asked_about_again_soon(
    make: Make, add_provider: AddProvider
) -> None:
    made = make(LONG, listening=None)
    eventually(lambda: made.ids() == [])
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])


def test_a_listener_that_is_told_of_a_first_provider_does_not_ask_for_it(make: Make) -> None:
    made = make(LONG)
    wait_until_listening()
    assert made.preferences.lacking()
    assert made.refresher._reloads.at > time.monotonic() + LONG / 2


def test_what_is_held_never_expires_while_postgresql_can_be_asked(
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


def test_while_the_listener_cannot_connect_the_time_still_counts(
    make: Make, add_provider: AddProvider, database: Environment
) -> None:
    """Its place may be another: past a pooler."""
    with refusing() as port:
        elsewhere = Settings.from_env(database | {"DB_LISTEN_PORT": str(port)})
        made = make(SOON, listening=Database.listening(elsewhere))
        eventually(lambda: made.ids() == [])
        added = add_provider("http://a/")
        eventually(lambda: made.ids() == [added])
        assert not listening()


# --- a replica


class Replica(Database):
    """A database that counts its connections and can be made to look like a standby, or be away."""

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


@pytest.mark.usefixtures("untold")
def test_a_listener_reads_in_time_too_and_with_the_connection_that_it_has(
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


def test_a_replica_is_read_when_time_has_passed_and_not_at_a_change(
    make: Make, add_provider: AddProvider, replica: Replica
) -> None:
    made = make(LONG, replica=replica)
    wait_until_listening()
    added = add_provider("http://a/")
    eventually(lambda: made.ids() == [added])
    assert replica.asked == 0
    make(SOON, replica=replica)
    eventually(lambda: replica.asked > 2)


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("with_listener", [True, False])
def test_where_the_replica_is_away_or_behind_the_primary_is_read(
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


def test_a_replica_that_fails_in_any_way_costs_the_listener_nothing(
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
def test_where_no_other_place_is_named_there_is_no_replica(
    make_settings: MakeSettings, port: str | None, *, is_asked: bool
) -> None:
    notifier = build(make_settings(db_port="1", db_read_port=port))
    assert (notifier.refresher._replica is not None) is is_asked
    notifier.close()


def behind_on(replica: Replica, reload: Any) -> Any:
    """A `reload` that does not believe what comes from the replica."""
    connections: list[Connection] = []
    connect_really = replica.connect

    def connect_and_note() -> Connection:
        connections.append(connect_really())
        return connections[-1]

    replica.connect = connect_and_note  # type: ignore[method-assign]

    def keep_unless_from_replica(preferences: Preferences, connection: Connection) -> bool:
        return connection not in connections and reload(preferences, connection)

    return keep_unless_from_replica


def test_a_replica_that_fails_is_asked_less_and_less(
    make: Make, replica: Replica, began: list[float]
) -> None:
    """One that hangs would keep us from hearing of changes each time."""
    replica.away = True
    make(SOON, replica=replica)
    eventually(lambda: len(began) >= 9)
    assert 2 <= replica.asked <= 5


# --- faults


def test_failed_attempts_pause_twice_as_long_each_time_up_to_half_a_minute(
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
    """Each pause after a failure of the listener's, unshortened."""
    noted: list[float] = []
    monkeypatch.setattr(refresher, "_jitter", lambda _, high: high)
    fail = refresher._Backoff.fail

    def note(attempts: Any) -> None:
        fail(attempts)
        noted.append(round(attempts.at - time.monotonic(), 1))

    monkeypatch.setattr(refresher._Backoff, "fail", note)
    return noted


def test_a_connection_on_which_nothing_can_be_read_is_one_failure(
    make: Make, execute: Execute, pauses: list[float]
) -> None:
    """Reading by the time, which fails as well, has pauses of its own."""
    execute("REVOKE SELECT ON notification_preferences FROM notifier_service")
    make()
    eventually(lambda: len(pauses) >= 6)
    assert sorted(pauses[:6]) == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_a_pause_begins_when_the_attempt_has_ended(make: Make, pauses: list[float]) -> None:
    with silent() as port:
        make(variables={"DB_HOST": LOOPBACK, "DB_PORT": str(port)}.items())
        eventually(lambda: len(pauses) >= 3)
    assert pauses[:3] in ([0.5, 0.5, 1.0], [0.5, 1.0, 0.5])


@pytest.mark.parametrize("hanging", [refusing, silent])
def test_a_server_that_is_away_costs_few_attempts_and_lines(
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
        time.sleep(1)  # more of it would show a loop without a pause
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


def test_a_connection_that_worked_is_made_again_soon_however_often_it_is_lost(
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


def test_once_the_listener_is_lost_a_channel_without_a_provider_is_asked_about_again_soon(
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


def test_a_server_process_that_stops_before_it_listens_is_given_up_and_replaced(
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
def test_the_unforeseen_is_logged_and_tried_again(
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
    eventually(lambda: not refreshers())  # those that other tests have left behind
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
    """Return what this process has open. Files that earlier tests left may close at any time."""
    opened = set()
    for entry in Path("/dev/fd").iterdir():
        with suppress(OSError):  # the listing's own is closed by now
            status = os.fstat(int(entry.name))
            opened.add((int(entry.name), status.st_dev, status.st_ino))
    return opened


def test_one_that_never_began_can_be_closed(database: Environment) -> None:
    before = open_files()
    Refreshed(database, LONG).refresher.close()
    assert open_files() <= before


def test_closing_leaves_a_thread_behind_that_does_not_end_in_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Preferences, connection: Connection) -> bool:
        hangs.set()
        return goes_on.wait(20)

    monkeypatch.setattr(Preferences, "reload", hang)
    monkeypatch.setattr(refresher, "DATABASE_WAIT", 0.5)
    eventually(lambda: not refreshers())  # those that other tests have left behind
    made = make()
    assert hangs.wait(10)
    with within(5):
        made.refresher.close()
    assert refreshers() == 1
    goes_on.set()
    eventually(lambda: refreshers() == 0)
