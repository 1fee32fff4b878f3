"""A channel's providers, from a real PostgreSQL: their order, the cache, and its replacement."""

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from notifier.errors import PreferencesUnavailable
from notifier.logs import LOG_INTERVAL
from notifier.models import Channel, Provider
from notifier.settings import Settings
from notifier.store import preferences as preferences_module
from notifier.store.db import DATABASE_WAIT, Connection, Database
from notifier.store.preferences import (
    FIRST_LOAD_PAUSE,
    QUERY,
    REPLAYED,
    SHORTEST_LIFETIME,
    WRITTEN,
    Preferences,
)
from tests.fixtures import Environment, Growth, connect, one_role
from tests.sockets import LOOPBACK, refusing, silent
from tests.timing import eventually, within

LIFETIME = 600.0


class Clock:
    """A monotonic clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counting(Database):
    """A database that counts its connections and fails while `down` is set."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(Settings.from_env(environment))
        self.connections = 0
        self.down = False

    def connect(self) -> Connection:
        self.connections += 1
        if self.down:
            raise psycopg.OperationalError("the server closed the connection unexpectedly")
        return super().connect()


def ask(
    known: Preferences, channel: Channel = Channel.EMAIL, *, seconds: float = 10
) -> tuple[Provider, ...]:
    return known.for_channel(channel, time.monotonic() + seconds)


def reload(known: Preferences, database: Database) -> bool:
    with database.connect() as connection:
        return known.reload(connection)


def ids(providers: tuple[Provider, ...]) -> list[int]:
    return [provider.id for provider in providers]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counting(database: Environment) -> Counting:
    return Counting(database)


@pytest.fixture
def known(counting: Counting, clock: Clock) -> Iterator[Preferences]:
    yield Preferences(counting, LIFETIME, clock)
    eventually(no_load_is_under_way)


def no_load_is_under_way() -> bool:
    return all(thread.name != "preferences" for thread in threading.enumerate())


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    """Return how many warnings say that expired providers were served."""
    return sum(
        record.levelno == logging.WARNING and record.msg == "serving expired preferences"
        for record in caplog.records
    )


def test_the_rows_of_a_channel_are_ordered_by_priority_and_then_by_id(
    known: Preferences, add_provider: Callable[..., int], database: Environment
) -> None:
    """A row without a priority comes last, as NULL does in PostgreSQL."""
    none = add_provider("http://a/", priority=None)
    late, first, second = (add_provider("http://a/", priority=p) for p in (5, 0, 0))
    negative = add_provider("http://a/", priority=-1)
    push = add_provider("http://a/", "PushNotification", priority=-5)
    with connect(database) as connection:  # PostgreSQL stores a changed row behind the others
        for priority in (9, 0):
            connection.execute(
                "UPDATE notification_preferences SET priority = %s WHERE id = %s", (priority, first)
            )
    assert ids(ask(known)) == [negative, first, second, late, none]
    assert ids(ask(known, Channel.PUSH)) == [push]


def test_deleted_rows_are_absent(
    known: Preferences, add_provider: Callable[..., int], database: Environment
) -> None:
    kept, deleted = add_provider("http://a/"), add_provider("http://b/")
    with connect(database) as connection:
        connection.execute(
            "UPDATE notification_preferences SET deleted_at = now() WHERE id = %s", (deleted,)
        )
    assert ids(ask(known)) == [kept]


def test_a_row_becomes_a_provider_whose_repr_hides_its_secret(
    known: Preferences, add_provider: Callable[..., int]
) -> None:
    first = add_provider(" https://Mail.Example.COM/v1 ", name="mail", secret_key="s3cr3t")
    second = add_provider("not a url", name="broken", secret_key=None)
    assert ask(known) == (
        Provider(
            first,
            Channel.EMAIL,
            "mail",
            "https://Mail.Example.COM/v1",
            "mail.example.com:443",
            "s3cr3t",
        ),
        Provider(second, Channel.EMAIL, "broken", "not a url", None, ""),
    )
    assert "s3cr3t" not in repr(ask(known))


def test_one_query_loads_every_channel_and_later_look_ups_use_the_cache(
    known: Preferences, counting: Counting, clock: Clock, add_provider: Callable[..., int]
) -> None:
    email, push = add_provider("http://a/"), add_provider("http://b/", "PushNotification")
    for later in (0, LIFETIME / 2, LIFETIME, LIFETIME):
        clock.now += later
        assert ids(ask(known)) == [email]
        assert ids(ask(known, Channel.PUSH)) == [push]
    assert counting.connections == 1


def test_a_reload_replaces_the_whole_cache(
    known: Preferences, counting: Counting, add_provider: Callable[..., int], database: Environment
) -> None:
    gone = add_provider("http://a/")
    assert ids(ask(known)) == [gone]
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    push = add_provider("http://b/", "PushNotification")
    assert reload(known, counting) is True
    assert (ids(ask(known)), ids(ask(known, Channel.PUSH))) == ([], [push])


def test_a_channel_without_a_provider_is_lacking(
    known: Preferences, counting: Counting, add_provider: Callable[..., int]
) -> None:
    assert known.lacking()
    for channel in Channel:
        reload(known, counting)
        assert known.lacking()
        add_provider("http://a/", channel)
    reload(known, counting)
    assert not known.lacking()


def test_twenty_concurrent_first_look_ups_run_one_query(
    known: Preferences,
    counting: Counting,
    add_provider: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = add_provider("http://a/")
    waiting = threading.Semaphore(0)
    results: list[list[int]] = []
    connect_now, result = counting.connect, Future.result

    def connect_when_all_wait() -> Connection:
        for _ in range(20):
            assert waiting.acquire(timeout=10)
        return connect_now()

    def count_waiting(future: Future[Any], timeout: float | None = None) -> Any:
        waiting.release()
        return result(future, timeout)

    monkeypatch.setattr(counting, "connect", connect_when_all_wait)
    monkeypatch.setattr(Future, "result", count_waiting)
    threads = [
        threading.Thread(target=lambda: results.append(ids(ask(known, seconds=30))))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [[added]] * 20
    assert counting.connections == 1


def connections_of(name: str, environment: Environment) -> int:
    """Return how many server processes work for the application `name`."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with connect(environment) as connection:
        return int(connection.execute(query, (name,)).fetchall()[0][0])


def test_no_connection_is_left_open_after_a_load(database: Environment) -> None:
    known = Preferences(Counting(database | {"APP_NAME": "the-test"}), LIFETIME)
    for channel in Channel:
        ask(known, channel)
    eventually(
        lambda: connections_of("the-test", database) == 0
    )  # a server process ends a little later


def test_a_query_that_waits_for_a_lock_is_given_up_and_ends_in_the_server_too(
    database: Environment,
) -> None:
    """Otherwise every load would add a waiting server process, until no connection is left."""
    known = Preferences(Counting(database | {"APP_NAME": "waits"}), LIFETIME)
    with connect(database) as connection, connection.transaction():
        connection.execute("LOCK TABLE notification_preferences IN ACCESS EXCLUSIVE MODE")
        with within(DATABASE_WAIT + 1), pytest.raises(PreferencesUnavailable):
            ask(known)
        eventually(no_load_is_under_way, DATABASE_WAIT + 5)
        eventually(lambda: connections_of("waits", database) == 0, 3)


def test_the_query_can_use_the_partial_index(database: Environment) -> None:
    with connect(database) as connection, psycopg.ClientCursor(connection) as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(f"EXPLAIN {QUERY}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "idx_notification_prefs_provider_deleted_active" in plan


def test_a_failed_reload_keeps_the_cache(
    known: Preferences, counting: Counting, add_provider: Callable[..., int]
) -> None:
    added = add_provider("http://a/")
    ask(known)
    with counting.connect() as connection:
        connection.close()
        with pytest.raises(psycopg.Error):
            known.reload(connection)
    assert ids(ask(known)) == [added]


def test_expired_providers_are_served_with_a_warning_until_they_are_replaced(
    known: Preferences,
    counting: Counting,
    clock: Clock,
    add_provider: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = add_provider("http://a/")
    ask(known)
    clock.now += LIFETIME - 0.001
    ask(known)
    assert warnings(caplog) == 0
    clock.now += 0.001
    for later in (0, 0, LOG_INTERVAL - 0.001, 0.002):
        clock.now += later
        assert ids(ask(known, seconds=-1)) == [first]
    assert (warnings(caplog), counting.connections) == (2, 1)
    assert [
        record.__dict__["times"] for record in caplog.records if "times" in record.__dict__
    ] == [
        1,
        3,
    ]
    second = add_provider("http://b/")
    reload(known, counting)
    assert ids(ask(known)) == [first, second]
    assert warnings(caplog) == 2


def test_a_lifetime_below_one_second_counts_as_one_second(
    counting: Counting, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    known = Preferences(counting, 0.001, clock)
    ask(known)
    clock.now += SHORTEST_LIFETIME - 0.001
    ask(known)
    assert warnings(caplog) == 0
    clock.now += 0.001
    ask(known)
    assert warnings(caplog) == 1


def test_an_empty_cache_without_a_server_fails_and_retries_once_a_second(
    database: Environment, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing() as port:
        counting = Counting(database | {"DB_PORT": str(port)})
        known = Preferences(counting, LIFETIME, clock)
        for later, asked in ((0, 1), (0, 1), (FIRST_LOAD_PAUSE - 0.001, 1), (0.002, 2)):
            clock.now += later
            with within(DATABASE_WAIT + 1), pytest.raises(PreferencesUnavailable):
                ask(known)
            assert counting.connections == asked
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    named = [[error.__dict__[name] for name in ("error", "reason", "host")] for error in errors]
    assert named == [["OperationalError", "refused", f"{database['DB_HOST']}:{port}"]] * 2
    assert database["DB_PASSWORD"] not in caplog.text


def test_a_look_up_whose_first_load_fails_uses_the_providers_that_were_read_meanwhile(
    known: Preferences,
    counting: Counting,
    database: Environment,
    add_provider: Callable[..., int],
    growth: Growth,
) -> None:
    added = add_provider("http://a/")

    def reload_and_fail() -> Connection:
        reload(known, Database(Settings.from_env(database)))
        raise psycopg.OperationalError("timeout expired")

    counting.connect = reload_and_fail  # type: ignore[method-assign]
    assert ids(ask(known)) == [added]
    assert growth("preference_cache_total") == {("miss",): 1}


def test_without_free_descriptors_the_preferences_are_unavailable(
    known: Preferences, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Connection:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(counting, "connect", fail)
    with pytest.raises(PreferencesUnavailable):
        ask(known)


def test_without_a_thread_for_the_first_load_the_preferences_are_unavailable_and_the_log_says_why(
    known: Preferences, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(PreferencesUnavailable):
            ask(known)
    (line,) = (record for record in caplog.records if record.message == "database error")
    assert line.__dict__["reason"] == "this machine has no free descriptor, port, thread or memory"
    assert ask(known) == ()


def test_each_look_up_is_counted_by_its_result(
    known: Preferences, counting: Counting, clock: Clock, growth: Growth
) -> None:
    def counts() -> dict[str, float]:
        return {result: n for (result,), n in growth("preference_cache_total").items()}

    counting.down = True
    with pytest.raises(PreferencesUnavailable):
        ask(known)
    assert counts() == {"error": 1}
    assert known.held() is False
    counting.down = False
    clock.now += FIRST_LOAD_PAUSE
    ask(known)
    assert counts() == {"error": 1, "miss": 1}
    assert known.held() is True
    ask(known, Channel.PUSH)
    assert counts() == {"error": 1, "miss": 1, "hit": 1}
    clock.now += LIFETIME
    ask(known)
    ask(known)
    assert counts() == {"error": 1, "miss": 1, "hit": 1, "stale": 2}


def test_each_reload_sets_the_metric_of_the_last_refresh(
    known: Preferences, counting: Counting
) -> None:
    for _ in range(2):
        before = time.time()
        reload(known, counting)
        assert before <= last_refresh() <= time.time()


def last_refresh() -> float:
    (family,) = preferences_module.metrics.LAST_REFRESH.collect()
    return float(family.samples[0].value)


def test_a_load_queries_postgresql_only_if_the_cache_is_empty(
    known: Preferences, counting: Counting, growth: Growth
) -> None:
    for _ in range(2):
        known.load(time.monotonic() + 5)
        assert known.held()
    assert counting.connections == 1
    assert growth("preference_cache_total") == {("miss",): 1}


def test_a_load_that_fails_raises_an_error_and_is_counted(
    known: Preferences, counting: Counting, growth: Growth
) -> None:
    counting.down = True
    with pytest.raises(PreferencesUnavailable):
        known.load(time.monotonic() + 5)
    assert not known.held()
    assert growth("preference_cache_total") == {
        ("error",): 1
    }  # no look-up may follow that would count it


def test_each_load_reports_the_endpoints_of_all_providers(
    counting: Counting, add_provider: Callable[..., int], database: Environment
) -> None:
    reported: list[Set[str]] = []
    known = Preferences(counting, LIFETIME, on_load=reported.append)
    for url in ("http://a/", "https://A/", "ftp://no"):
        add_provider(url)
    add_provider("http://push/", "PushNotification")
    ask(known, Channel.PUSH)
    ask(known, Channel.EMAIL)
    assert reported == [{"push:80", "a:80", "a:443"}]
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    reload(known, counting)
    assert reported == [{"push:80", "a:80", "a:443"}, set()]


class Paused:
    """Makes the first read wait, once it has its rows, until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_read, self.go_on = threading.Event(), threading.Event()
        self._read = preferences_module._read
        self._first = True
        monkeypatch.setattr(preferences_module, "_read", self)

    def __call__(self, connection: Connection) -> Any:
        load = self._read(connection)
        if self._first:
            self._first = False
            self.has_read.set()
            assert self.go_on.wait(10)
        return load


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Paused:
    return Paused(monkeypatch)


def test_a_load_that_began_before_a_change_does_not_overwrite_a_later_load(
    known: Preferences, counting: Counting, paused: Paused, add_provider: Callable[..., int]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(reload, known, counting)
        assert paused.has_read.wait(10)
        added = add_provider("http://a/")
        assert reload(known, counting) is True
        paused.go_on.set()
        assert slow.result(10) is False
    assert ids(ask(known)) == [added]


def test_the_first_look_up_does_not_overwrite_a_later_load(
    known: Preferences, counting: Counting, paused: Paused, add_provider: Callable[..., int]
) -> None:
    """It returns the later load's providers, too."""
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, known)
        assert paused.has_read.wait(10)
        added = add_provider("http://a/")
        reload(known, counting)
        paused.go_on.set()
        assert ids(slow.result(10)) == [added]
    assert ids(ask(known)) == [added]


class Servers:
    """Replaces `_read` with loads from a primary or a standby at a given position."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.position = 0
        self.standby = False
        monkeypatch.setattr(preferences_module, "_read", self)

    def __call__(self, connection: Connection) -> Any:
        provider = Provider(self.position, Channel.EMAIL, "", "", None, "")
        providers = {Channel.EMAIL: (provider,), Channel.PUSH: ()}
        return preferences_module.Load(providers, self.position, self.standby)


def test_a_standbys_load_is_kept_only_once_it_has_reached_the_primarys_position(
    known: Preferences, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(monkeypatch)
    for position, standby, kept, held in (
        (5, True, True, 5),  # there is no primary's load to compare it with
        (10, False, True, 10),
        (9, True, False, 10),
        (10, True, True, 10),
        (12, True, True, 12),
        (11, True, True, 11),  # only the primary's position matters
        (20, False, True, 20),
        (19, True, False, 20),
        (15, False, True, 15),  # a new primary that has lost the old one's last changes
        (16, True, True, 16),
    ):
        servers.position, servers.standby = position, standby
        assert (reload(known, counting), ids(ask(known))) == (kept, [held]), position


def test_a_later_load_from_a_lagging_standby_does_not_shut_out_the_primarys_load(
    known: Preferences,
) -> None:
    """The primary's change has been notified already, and no notification will follow."""

    def load(number: int, position: int, *, standby: bool) -> Any:
        provider = Provider(number, Channel.EMAIL, "", "", None, "")
        providers = {Channel.EMAIL: (provider,), Channel.PUSH: ()}
        return preferences_module.Load(providers, position, standby)

    for generation, position, standby, kept, held in (
        (2, 5, True, True, 2),
        (1, 9, False, True, 1),
        (4, 10, True, True, 4),
        (3, 12, True, False, 4),  # of two standbys the one that was read later
        (6, 20, False, True, 6),
        (5, 21, False, False, 6),
    ):
        result = known._keep(load(generation, position, standby=standby), generation)
        assert (result, ids(ask(known))) == (kept, [held]), generation


def test_rows_are_never_older_than_a_standbys_position_or_newer_than_a_primarys(
    counting: Counting, add_provider: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that is added right after the position was read appears only on a standby."""
    value = preferences_module._value
    added: list[int] = []

    def then_add(connection: Connection, query: Any) -> int | None:
        position = 5 if (standby, query) == (True, REPLAYED) else value(connection, query)
        if position is not None:
            added.append(add_provider("http://a/"))
        return position

    monkeypatch.setattr(preferences_module, "_value", then_add)
    for standby in (False, True):
        before = [*added]
        with counting.connect() as connection:
            load = preferences_module._read(connection)
        assert load.from_standby is standby
        assert len(added) == len(before) + 1
        assert ids(load.providers[Channel.EMAIL]) == (added if standby else before)


def test_a_primarys_position_comes_after_the_rows_that_were_read(
    counting: Counting, add_provider: Callable[..., int]
) -> None:
    with counting.connect() as connection:
        positions = []
        for _ in range(2):
            load = preferences_module._read(connection)
            assert load.from_standby is False
            positions.append(load.position)
            add_provider("http://a/")
        assert connection.execute(REPLAYED).fetchone() == (None,)
        (written,) = connection.execute(WRITTEN).fetchone() or (0,)
    assert positions[0] < positions[1] < written


def test_a_missing_table_is_a_database_error_like_any_other(
    empty_database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    """Its line names the one of several hosts that answered."""
    host, port = empty_database["DB_HOST"], empty_database["DB_PORT"]
    with refusing() as other:
        several = {"DB_HOST": f"{host},{host}", "DB_PORT": f"{other},{port}"}
        known = Preferences(Counting(one_role(empty_database) | several), LIFETIME)
        with pytest.raises(PreferencesUnavailable):
            ask(known)
    (error,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert error.__dict__["error"] in ("UndefinedTable", "UndefinedObject")
    assert error.__dict__["reason"] == "the database, the user or the table does not exist"
    assert error.__dict__["host"] == f"{host}:{port}"


@pytest.mark.parametrize(("seconds", "longest"), [(30, DATABASE_WAIT), (0.3, 0.3), (-1, 0)])
def test_a_look_up_waits_for_a_silent_server_no_longer_than_the_wait_and_the_deadline(
    database: Environment, seconds: float, longest: float
) -> None:
    with silent() as port:
        counting = Counting(database | {"DB_HOST": LOOPBACK, "DB_PORT": str(port)})
        known = Preferences(counting, LIFETIME)
        with within(longest + 1), pytest.raises(PreferencesUnavailable):
            ask(known, seconds=seconds)
        eventually(no_load_is_under_way, DATABASE_WAIT + 5)  # the load gives up as well
    assert counting.connections == 1


class Stopped(Counting):
    """Stops the server process of each connection with SIGSTOP."""

    processes: list[int]

    def connect(self) -> Connection:
        connection = super().connect()
        self.processes.append(connection.info.backend_pid)
        os.kill(self.processes[-1], signal.SIGSTOP)
        return connection


@pytest.fixture
def stopped(database: Environment) -> Iterator[Stopped]:
    """A database whose stopped server processes continue when the test ends."""
    stopped = Stopped(database)
    stopped.processes = []
    yield stopped
    for process in stopped.processes:
        os.kill(process, signal.SIGCONT)


def test_a_stopped_server_process_costs_a_look_up_no_more_than_the_wait_and_its_deadline(
    stopped: Stopped,
) -> None:
    known = Preferences(stopped, LIFETIME)
    for _ in range(3):
        with within(1), pytest.raises(PreferencesUnavailable):
            ask(known, seconds=0.1)
    with within(DATABASE_WAIT + 1.5), pytest.raises(PreferencesUnavailable):
        ask(known)
    eventually(no_load_is_under_way, DATABASE_WAIT + 5)
    assert len(stopped.processes) <= 2


def test_once_one_look_up_has_waited_in_vain_no_other_waits(database: Environment) -> None:
    """In an outage waiting threads would leave none for other requests."""
    with silent() as port:
        known = Preferences(Counting(database | {"DB_PORT": str(port)}), LIFETIME)
        with within(DATABASE_WAIT + 1), pytest.raises(PreferencesUnavailable):
            ask(known)
        for _ in range(20):
            with within(0.5), pytest.raises(PreferencesUnavailable):
                ask(known)
        eventually(no_load_is_under_way, DATABASE_WAIT + 5)


def test_the_first_of_several_hosts_may_hang(
    database: Environment, add_provider: Callable[..., int]
) -> None:
    added = add_provider("http://a/")
    with silent() as port:
        several = {"DB_HOST": f"{LOOPBACK},{LOOPBACK}", "DB_PORT": f"{port},{database['DB_PORT']}"}
        assert ids(ask(Preferences(Counting(database | several), LIFETIME))) == [added]


def test_the_wait_for_the_database_is_two_seconds_for_each_host(database: Environment) -> None:
    assert DATABASE_WAIT == 2.0
    assert Database(Settings.from_env(database)).wait == DATABASE_WAIT
    assert Database(Settings.from_env(database | {"DB_HOST": "a,b"})).wait == 2 * DATABASE_WAIT
