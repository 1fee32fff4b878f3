"""The providers of a channel, from a real PostgreSQL: order, cache, and what happens without it."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, LiteralString

import psycopg
import pytest

from notifier.db import DATABASE_WAIT, Database
from notifier.errors import PreferencesUnavailable
from notifier.models import Channel, Provider
from notifier.preferences import EMPTY_LIFETIME, QUERY, Preferences
from notifier.settings import Settings
from tests.conftest import Environment, Growth, connect
from tests.sockets import LOOPBACK, refusing, silent
from tests.timing import eventually, within

LIFETIME = 600.0


class Clock:
    """A monotonic clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counting(Database):
    """The database, counting what it is asked; it can be told to fail."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(Settings.from_env(environment))
        self.queries = 0
        self.down = False

    def fetch(self, query: LiteralString, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        self.queries += 1
        if self.down:
            raise psycopg.OperationalError("the server closed the connection unexpectedly")
        return super().fetch(query, parameters)


def ask(
    known: Preferences, channel: Channel = Channel.EMAIL, *, seconds: float = 10
) -> tuple[Provider, ...]:
    return known.providers(channel, time.monotonic() + seconds)


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
    eventually(no_reload_is_under_way)


def no_reload_is_under_way() -> bool:
    return all(thread.name != "preferences" for thread in threading.enumerate())


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    """How often it was warned that expired providers were served."""
    return sum(
        record.levelno == logging.WARNING and record.msg == "serving expired preferences"
        for record in caplog.records
    )


def test_the_rows_of_the_channel_come_by_priority_and_then_by_id(
    known: Preferences, add_provider: Callable[..., int], database: Environment
) -> None:
    """A row without a priority comes last, as NULL does in PostgreSQL."""
    none = add_provider("http://a/", priority=None)
    late, first, second = (add_provider("http://a/", priority=p) for p in (5, 0, 0))
    negative = add_provider("http://a/", priority=-1)
    push = add_provider("http://a/", "PushNotification", priority=-5)
    with connect(database) as connection:  # PostgreSQL moves a row that changes behind the others
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


def test_a_row_becomes_a_provider_whose_secret_no_repr_shows(
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


def test_a_hit_asks_postgresql_nothing_until_the_entry_expires(
    known: Preferences, counting: Counting, clock: Clock, add_provider: Callable[..., int]
) -> None:
    first = add_provider("http://a/")
    assert ids(ask(known)) == [first]
    second = add_provider("http://b/")
    clock.now += LIFETIME - 0.001
    assert ids(ask(known)) == [first]
    assert counting.queries == 1
    clock.now += 0.001
    assert ids(ask(known)) == [first, second]
    assert ids(ask(known)) == [first, second]
    assert counting.queries == 2


def test_channels_are_kept_apart(
    known: Preferences, counting: Counting, add_provider: Callable[..., int]
) -> None:
    email, push = add_provider("http://a/"), add_provider("http://b/", "PushNotification")
    for _ in range(2):
        assert ids(ask(known)) == [email]
        assert ids(ask(known, Channel.PUSH)) == [push]
    assert counting.queries == 2


def test_an_empty_channel_is_asked_about_again_soon(
    known: Preferences, counting: Counting, clock: Clock, add_provider: Callable[..., int]
) -> None:
    assert ask(known) == ()
    added = add_provider("http://a/")
    clock.now += EMPTY_LIFETIME - 0.001
    assert ask(known) == ()
    assert counting.queries == 1
    clock.now += 0.001
    assert ids(ask(known)) == [added]


def test_a_lifetime_shorter_than_an_empty_channels_holds_for_that_too(
    counting: Counting, clock: Clock
) -> None:
    known = Preferences(counting, EMPTY_LIFETIME / 2, clock)
    for _ in range(3):
        assert ask(known) == ()
        clock.now += EMPTY_LIFETIME / 2
    assert counting.queries == 3


def test_twenty_misses_at_once_run_one_query(
    known: Preferences,
    counting: Counting,
    add_provider: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = add_provider("http://a/")
    waiting = threading.Semaphore(0)
    results: list[list[int]] = []
    fetch, result = counting.fetch, Future.result

    def fetch_when_all_wait(*args: Any) -> list[tuple[Any, ...]]:
        for _ in range(20):
            assert waiting.acquire(timeout=10)
        return fetch(*args)

    def count_who_waits(future: Future[Any], timeout: float | None = None) -> Any:
        waiting.release()
        return result(future, timeout)

    monkeypatch.setattr(counting, "fetch", fetch_when_all_wait)
    monkeypatch.setattr(Future, "result", count_who_waits)
    threads = [
        threading.Thread(target=lambda: results.append(ids(ask(known, seconds=30))))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [[added]] * 20
    assert counting.queries == 1


def connections_of(name: str, environment: Environment) -> int:
    """How many processes of the server work for the application `name`."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with connect(environment) as connection:
        return int(connection.execute(query, (name,)).fetchall()[0][0])


def test_no_connection_is_left_open_after_a_load(database: Environment) -> None:
    known = Preferences(Counting(database | {"APP_NAME": "the-test"}), LIFETIME)
    for channel in Channel:
        ask(known, channel)
    eventually(lambda: connections_of("the-test", database) == 0)  # processes end a little after


def test_a_query_that_waits_for_a_lock_is_left_and_leaves_nothing_behind_in_the_server(
    database: Environment,
) -> None:
    """Else every reload adds a process that waits there, until no connection is left for others."""
    known = Preferences(Counting(database | {"APP_NAME": "waits"}), LIFETIME)
    with connect(database) as connection, connection.transaction():
        connection.execute("LOCK TABLE notification_preferences IN ACCESS EXCLUSIVE MODE")
        with within(DATABASE_WAIT + 1), pytest.raises(PreferencesUnavailable):
            ask(known)
        eventually(no_reload_is_under_way, DATABASE_WAIT + 5)
        eventually(lambda: connections_of("waits", database) == 0, 3)


def test_the_query_can_use_the_partial_index(database: Environment) -> None:
    with connect(database) as connection, psycopg.ClientCursor(connection) as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(f"EXPLAIN {QUERY}", ("Email",))
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "idx_notification_prefs_provider_deleted_active" in plan


def test_expired_providers_are_served_while_the_database_is_gone_and_then_reloaded(
    known: Preferences,
    clock: Clock,
    add_provider: Callable[..., int],
    allow_connections: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = add_provider("http://a/")
    ask(known)
    second = add_provider("http://b/")
    allow_connections("false")
    clock.now += LIFETIME
    for _ in range(3):
        assert ids(ask(known)) == [first]
    assert warnings(caplog) == 3
    allow_connections("true")
    clock.now += 1
    assert ids(ask(known)) == [first, second]
    assert warnings(caplog) == 3


def test_failed_reloads_back_off_and_a_good_one_starts_afresh(
    known: Preferences, counting: Counting, clock: Clock, add_provider: Callable[..., int]
) -> None:
    added = add_provider("http://a/")
    ask(known)
    clock.now += LIFETIME
    counting.queries = 0
    for round_ in range(2):
        counting.down = True
        for pause in (1, 2, 4, 8, 16, 30, 30, 30):
            before = counting.queries
            assert ids(ask(known)) == [added]
            clock.now += pause - 0.001
            assert ids(ask(known)) == [added]
            assert counting.queries == before + 1, (round_, pause)
            clock.now += 0.001
        counting.down = False
        assert ids(ask(known)) == [added]
        clock.now += LIFETIME


def test_one_channels_failures_do_not_expire_the_other(
    known: Preferences, counting: Counting, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ask(known, Channel.EMAIL)
    clock.now += EMPTY_LIFETIME / 2
    ask(known, Channel.PUSH)
    counting.down = True
    clock.now += EMPTY_LIFETIME / 2
    ask(known, Channel.EMAIL)
    ask(known, Channel.PUSH)
    assert warnings(caplog) == 1
    assert counting.queries == 3


def test_a_cold_cache_without_a_server_knows_nothing_and_asks_each_time(
    database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing() as port:
        counting = Counting(database | {"DB_PORT": str(port)})
        known = Preferences(counting, LIFETIME)
        for _ in range(2):
            with within(DATABASE_WAIT + 1), pytest.raises(PreferencesUnavailable):
                ask(known)
    assert counting.queries == 2
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [error.__dict__["error"] for error in errors] == ["OperationalError"] * 2
    assert database["DB_PASSWORD"] not in caplog.text


def test_each_look_up_is_counted_by_how_it_ended(
    known: Preferences,
    counting: Counting,
    clock: Clock,
    add_provider: Callable[..., int],
    growth: Growth,
) -> None:
    add_provider("http://a/")

    def counts() -> dict[str, float]:
        return {result: n for (result,), n in growth("preference_cache_total").items()}

    ask(known)
    assert counts() == {"miss": 1}
    ask(known)
    assert counts() == {"miss": 1, "hit": 1}
    clock.now += LIFETIME
    counting.down = True
    ask(known)
    ask(known)  # while it backs off
    assert counts() == {"miss": 1, "hit": 1, "stale": 2}
    with pytest.raises(PreferencesUnavailable):
        ask(known, Channel.PUSH)
    assert counts() == {"miss": 1, "hit": 1, "stale": 2, "error": 1}
    assert known.held() is False
    assert counts()["hit"] == 1


def test_a_load_asks_only_for_what_is_not_held(
    known: Preferences, counting: Counting, clock: Clock, growth: Growth
) -> None:
    ask(known)
    clock.now += LIFETIME
    assert not known.held()
    known.load(time.monotonic() + 5)
    assert known.held()
    known.load(time.monotonic() + 5)
    assert counting.queries == 2
    assert growth("preference_cache_total") == {("miss",): 2}


def test_a_load_that_cannot_ask_says_so_and_is_counted(
    known: Preferences, counting: Counting, growth: Growth
) -> None:
    counting.down = True
    with pytest.raises(PreferencesUnavailable):
        known.load(time.monotonic() + 5)
    assert not known.held()
    assert growth("preference_cache_total") == {("error",): 1}  # nobody may ever ask otherwise


def test_after_each_load_the_hosts_of_all_known_providers_are_told(
    counting: Counting, clock: Clock, add_provider: Callable[..., int]
) -> None:
    told: list[Set[str]] = []
    known = Preferences(counting, LIFETIME, clock, on_load=told.append)
    for url in ("http://a/", "https://A/", "ftp://no"):
        add_provider(url)
    add_provider("http://push/", "PushNotification")
    ask(known, Channel.PUSH)
    ask(known, Channel.EMAIL)
    ask(known, Channel.EMAIL)
    assert told == [{"push:80"}, {"push:80", "a:80", "a:443"}]
    clock.now += LIFETIME
    counting.down = True
    ask(known, Channel.EMAIL)
    assert len(told) == 2  # what is served expired is still configured


def test_loads_of_different_channels_are_told_one_after_the_other(counting: Counting) -> None:
    """Else what was known before one of them could be told after it."""
    both = threading.Barrier(2)
    at_once: list[Set[str]] = []

    def tell(hosts: Set[str]) -> None:
        with suppress(threading.BrokenBarrierError):  # nobody else is told meanwhile
            both.wait(0.5)
            at_once.append(hosts)

    known = Preferences(counting, LIFETIME, on_load=tell)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda channel: ask(known, channel), Channel)) == [(), ()]
    assert at_once == []


def test_a_channel_that_loses_its_last_provider_is_told(
    counting: Counting, clock: Clock, add_provider: Callable[..., int], database: Environment
) -> None:
    told: list[Set[str]] = []
    known = Preferences(counting, LIFETIME, clock, on_load=told.append)
    add_provider("http://a/")
    ask(known)
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    clock.now += LIFETIME
    assert ask(known) == ()
    assert told == [{"a:80"}, set()]


def test_a_missing_table_is_a_database_error_like_any_other(
    empty_database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PreferencesUnavailable):
        ask(Preferences(Counting(empty_database), LIFETIME))
    (error,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert error.__dict__["error"] in ("UndefinedTable", "UndefinedObject")


@pytest.mark.parametrize(("seconds", "longest"), [(30, DATABASE_WAIT), (0.3, 0.3), (-1, 0)])
def test_nobody_waits_for_a_server_that_says_nothing_beyond_the_wait_and_the_deadline(
    database: Environment, seconds: float, longest: float
) -> None:
    with silent() as port:
        counting = Counting(database | {"DB_HOST": LOOPBACK, "DB_PORT": str(port)})
        known = Preferences(counting, LIFETIME)
        with within(longest + 1), pytest.raises(PreferencesUnavailable):
            ask(known, seconds=seconds)
        eventually(no_reload_is_under_way, DATABASE_WAIT + 5)  # it gives up as well
    assert counting.queries == 1


class Stopped(Counting):
    """Stops the server's process of each connection, once `stop` is set."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.stop = False
        self.processes: list[int] = []

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = super().connect()
        if self.stop:
            self.processes.append(connection.info.backend_pid)
            os.kill(self.processes[-1], signal.SIGSTOP)
        return connection


@pytest.fixture
def stopped(database: Environment) -> Iterator[Stopped]:
    """A database whose stopped processes run on when the test ends."""
    stopped = Stopped(database)
    yield stopped
    for process in stopped.processes:
        os.kill(process, signal.SIGCONT)


def test_a_server_process_that_stops_in_the_query_costs_the_wait_once_and_then_a_back_off(
    stopped: Stopped,
    clock: Clock,
    add_provider: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    added = add_provider("http://a/")
    known = Preferences(stopped, LIFETIME, clock)
    ask(known)
    clock.now += LIFETIME
    stopped.stop = True
    with within(DATABASE_WAIT + 1.5):
        assert ids(ask(known)) == [added]
    eventually(no_reload_is_under_way, DATABASE_WAIT + 5)
    stopped.stop = False
    with within(1):
        assert ids(ask(known)) == [added]
    assert (stopped.queries, len(stopped.processes)) == (2, 1)
    assert warnings(caplog) == 2
    clock.now += 1
    assert ids(ask(known)) == [added]
    assert (stopped.queries, warnings(caplog)) == (3, 2)


def test_everybody_waits_for_the_one_reload_and_only_to_their_own_deadline(
    stopped: Stopped, clock: Clock, add_provider: Callable[..., int]
) -> None:
    added = add_provider("http://a/")
    known = Preferences(stopped, LIFETIME, clock)
    ask(known)
    clock.now += LIFETIME
    stopped.stop = True
    for _ in range(3):
        with within(1):
            assert ids(ask(known, seconds=0.1)) == [added]
    assert stopped.queries == 2
    eventually(no_reload_is_under_way, DATABASE_WAIT + 5)


def test_the_wait_for_the_database_is_two_seconds() -> None:
    assert DATABASE_WAIT == 2.0
