"""Workers hand the providers on: which load counts, and how a later worker begins."""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from notifier import __version__
from notifier.errors import PreferencesUnavailable
from notifier.models import Channel, Provider
from notifier.settings import Settings
from notifier.sharing.snapshot import LARGEST, Snapshot
from notifier.store.db import Connection, Database
from notifier.store.handover import Handover, Load
from notifier.store.preferences import Preferences
from tests.fixtures import Environment, Growth, MakeSettings, connect
from tests.timing import within

LIFETIME = 600.0


def load(number: int, position: int = 0, *, standby: bool = False, rows: int = 1) -> Load:
    """Return a load of `rows` providers, whose id is `number`."""
    url = "https://mail.example.com/v1"
    email = Provider(number, Channel.EMAIL, "Grüße", url, "mail.example.com:443", "s3cr3t\n")
    push = Provider(number, Channel.PUSH, "\u2028", "no URL", None, "")
    return Load({Channel.EMAIL: (email,) * rows, Channel.PUSH: (push,)}, position, standby)


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    made = Snapshot()
    yield made
    made.close()


@pytest.fixture
def handover(snapshot: Snapshot, make_settings: MakeSettings) -> Handover:
    return Handover(snapshot, make_settings())


def taken(handover: Handover) -> int | None:
    """Return the id of the providers that a new worker takes over."""
    found = handover.take()
    return found[1][Channel.EMAIL][0].id if found else None


def test_at_first_there_is_nothing_to_take(handover: Handover) -> None:
    assert handover.take() is None


def test_a_worker_takes_the_providers_that_another_has_given(
    handover: Handover, snapshot: Snapshot, make_settings: MakeSettings
) -> None:
    given = load(1, 7)
    handover.give(given, 5)
    found = Handover(snapshot, make_settings()).take()
    assert found is not None
    standing, providers = found
    assert providers == given.providers
    assert [type(one.channel) for one in providers[Channel.PUSH]] == [Channel]
    assert (standing.generation, standing.primary_generation, standing.position) == (5, 5, 7)


def test_a_table_without_rows_is_handed_over_too(handover: Handover) -> None:
    handover.give(Load({Channel.EMAIL: (), Channel.PUSH: ()}, 1, from_standby=False), 1)
    found = handover.take()
    assert found is not None
    assert found[1] == {Channel.EMAIL: (), Channel.PUSH: ()}


def test_a_worker_that_lags_does_not_replace_what_a_newer_load_has_given(
    handover: Handover,
) -> None:
    for generation, position, standby, kept in (
        (2, 5, True, 2),
        (1, 9, False, 1),  # a standby may lag behind
        (4, 10, True, 4),
        (3, 12, True, 4),
        (5, 8, True, 4),  # it has not reached the primary's position
        (7, 20, False, 7),
        (6, 21, False, 7),
        (8, 3, False, 8),  # the database was restored from a backup
        (9, 4, True, 9),
    ):
        handover.give(load(generation, position, standby=standby), generation)
        assert taken(handover) == kept, generation


@pytest.mark.parametrize("other", [{"db_name": "other"}, {"db_host": "a"}, {"db_port": "2"}])
def test_the_providers_of_another_database_are_neither_taken_nor_respected(
    other: dict[str, str], handover: Handover, snapshot: Snapshot, make_settings: MakeSettings
) -> None:
    handover.give(load(9), 9)
    elsewhere = Handover(snapshot, make_settings(**other))
    assert elsewhere.take() is None
    elsewhere.give(load(1), 1)
    assert (taken(elsewhere), handover.take()) == (1, None)


def test_a_table_that_is_too_large_is_not_handed_over_which_is_logged_once(
    handover: Handover, caplog: pytest.LogCaptureFixture
) -> None:
    handover.give(load(1), 1)
    large = load(2, rows=LARGEST // 50)
    for _ in range(2):
        handover.give(large, 2)
        assert handover.take() is None
    (record,) = caplog.records
    assert record.msg == "providers are not handed over"
    fields = record.__dict__
    assert (fields["error"], fields["reason"]) == ("OSError", os.strerror(errno.EFBIG))
    assert record.levelno == logging.WARNING
    handover.give(load(3), 3)
    assert taken(handover) == 3
    handover.give(large, 4)
    assert len(caplog.records) == 2


def test_memory_that_cannot_be_read_is_logged_and_nothing_is_taken(
    handover: Handover, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def short(*_: Any) -> bytes:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "pread", short)
    assert handover.take() is None
    handover.give(load(1), 1)
    assert [record.msg for record in caplog.records] == ["providers are not handed over"]


BAD_HEADS = [
    b"\xff\x00 garbage",
    b"null",
    b"7",
    b"[" * 100_000,
    *(
        json.dumps(["SOURCE", *numbers]).encode()
        for numbers in ([], [1], [1, 1, 1, 1], ["1", 1, 1], [1, None, 1], [1.5, 1, 1], [1, 2, 1])
    ),
    b'["SOURCE", %d, 1, 1]' % 10**30,
    b'["SOURCE", -%d, 1, 1]' % 10**400,
]

BAD_ROWS = [
    b"\xff\x00 garbage",
    b"null",
    b"7",
    b"[" * 100_000,
    *(
        json.dumps(rows).encode()
        for rows in (
            [[1]],
            [None],
            [[1, "Email", "a", "http://a/", "s", "more"]],
            [[1, "Sms", "a", "http://a/", "s"]],
            [[1, ["Email"], "a", "http://a/", "s"]],
            [["1", "Email", "a", "http://a/", "s"]],
            [[True, "Email", "a", "http://a/", "s"]],
            [[1, "Email", 5, "http://a/", "s"]],
            [[1, "Email", "\ud800", "http://a/", "s"]],
            [[1, "Email", "a", None, "s"]],
            [[1, "Email", "a", "http://a/", {}]],
        )
    ),
]


@pytest.mark.parametrize(
    "content",
    [
        *(head + b"\n[]" for head in BAD_HEADS),
        *(b'["SOURCE", 1, 1, 1]\n' + row for row in BAD_ROWS),
    ],
    ids=lambda content: repr(content[:60]),
)
def test_malformed_content_counts_as_none_and_is_logged_once(
    content: bytes,
    database: Environment,
    snapshot: Snapshot,
    add_provider: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    added = add_provider("http://a/")
    settings = Settings.from_env(database)
    source = json.dumps([__version__, *settings.serve_place, settings.db_name]).encode()
    snapshot.replace(lambda _: content.replace(b'"SOURCE"', source))
    worker = Worker(unreachable(database), snapshot)
    with pytest.raises(PreferencesUnavailable):
        worker.ids()
    (record,) = [one for one in caplog.records if one.msg == "providers are not handed over"]
    assert record.__dict__["reason"] == "malformed"
    worker.reload(database)
    assert Worker(unreachable(database), snapshot).ids() == [added]


def test_a_failure_to_hand_over_harms_no_load_and_leaves_nothing_out_of_date(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int]
) -> None:
    worker = Worker(database, snapshot)
    worker.reload(database)
    added = add_provider("http://a/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Provider, "row", lambda _: [object()])
        assert worker.reload(database)
    assert worker.ids() == [added]
    assert snapshot.read() == b""


# --- the preferences of a worker


class Worker:
    """The preferences of a worker that shares `snapshot`."""

    def __init__(self, environment: Environment, snapshot: Snapshot) -> None:
        settings = Settings.from_env(environment)
        self.now = time.monotonic()
        self.endpoints: list[set[str]] = []
        self.preferences = Preferences(
            Database(settings),
            LIFETIME,
            lambda: self.now,
            lambda all_: self.endpoints.append({*all_}),
        )
        self.preferences.inherit(Handover(snapshot, settings))

    def reload(self, environment: Environment) -> bool:
        with Database(Settings.from_env(environment)).connect() as connection:
            return self.preferences.reload(connection)

    def ids(self) -> list[int]:
        return [
            one.id for one in self.preferences.for_channel(Channel.EMAIL, time.monotonic() + 10)
        ]


def unreachable(environment: Environment) -> Environment:
    """Return the environment of the same database, which cannot be read."""
    return environment | {"DB_PASSWORD": "wrong"}


def test_a_worker_that_starts_in_an_outage_serves_what_another_has_read(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int], growth: Growth
) -> None:
    added = add_provider("http://mail.example.com/")
    Worker(database, snapshot).reload(database)
    later = Worker(unreachable(database), snapshot)
    with within(1):
        assert (later.preferences.held(), later.ids()) == (True, [added])
    assert later.endpoints == [{"mail.example.com:80"}]
    assert growth("preference_cache_total") == {("hit",): 1}


def test_providers_that_were_taken_over_expire_when_their_reader_would_have_reloaded(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int], growth: Growth
) -> None:
    added = add_provider("http://a/")
    Worker(database, snapshot).reload(database)
    later = Worker(unreachable(database), snapshot)
    for passed, result in ((LIFETIME - 60, "hit"), (60, "stale")):
        later.now += passed
        assert later.ids() == [added]
        assert growth("preference_cache_total")[(result,)] == 1


def test_a_workers_own_first_load_replaces_what_it_has_taken_over(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int]
) -> None:
    first = add_provider("http://a/")
    Worker(database, snapshot).reload(database)
    second = add_provider("http://b/")
    later = Worker(database, snapshot)
    assert later.ids() == [first]
    assert later.reload(database)
    assert later.ids() == [first, second]
    assert Worker(database, snapshot).ids() == [first, second]


def test_a_removed_provider_is_not_handed_over(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int]
) -> None:
    add_provider("http://a/")
    worker = Worker(database, snapshot)
    worker.reload(database)
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    worker.reload(database)
    assert Worker(unreachable(database), snapshot).ids() == []


def test_each_load_of_a_worker_is_handed_over_even_if_it_took_nothing_over(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int]
) -> None:
    worker = Worker(database, snapshot)
    assert not worker.preferences.held()
    added = add_provider("http://a/")
    assert worker.ids() == [added]  # the first load, by a look-up
    assert Worker(unreachable(database), snapshot).ids() == [added]


def test_a_worker_that_started_first_takes_what_another_could_read_later(
    database: Environment, snapshot: Snapshot, add_provider: Callable[..., int], growth: Growth
) -> None:
    added = add_provider("http://mail.example.com/")
    cold = Worker(unreachable(database), snapshot)
    with pytest.raises(PreferencesUnavailable):
        cold.ids()
    Worker(database, snapshot).reload(database)
    with within(1):  # the pause after a failed first load does not delay it
        assert cold.ids() == [added]
    assert cold.endpoints == [{"mail.example.com:80"}]
    assert growth("preference_cache_total") == {("error",): 1, ("miss",): 1}


def test_a_load_that_another_worker_ends_while_ours_fails_is_taken(
    database: Environment,
    snapshot: Snapshot,
    add_provider: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = add_provider("http://a/")
    other, cold = Worker(database, snapshot), Worker(database, snapshot)

    def fail(_: Database) -> Connection:
        monkeypatch.undo()
        other.reload(database)
        raise psycopg.OperationalError("the server closed the connection unexpectedly")

    monkeypatch.setattr(Database, "connect", fail)
    assert cold.ids() == [added]
