"""The providers' rows as operators manage them: which changes are refused, stored and shown."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC
from typing import Any, cast

import psycopg
import pytest

from notifier.errors import Refused
from notifier.models import Channel
from notifier.settings import Settings
from notifier.store import catalogue
from notifier.store.catalogue import Entry
from notifier.store.db import Database
from notifier.store.preferences import Preferences
from notifier.store.values import Values
from tests.fixtures import Environment, connect, one_role
from tests.timing import eventually, within

URL = "https://mail.example.com/v1/send"
OTHER_URL = "https://other.example.com/"
SECRET = "s3cr3t-key"

AddProvider = Callable[..., int]
Row = dict[str, Any]


@pytest.fixture
def owner(database: Environment) -> Database:
    return database_of(database)


def database_of(environment: Environment) -> Database:
    return Database.migrating(Settings.from_env(environment))


def values(**others: Any) -> Values:
    """Return a row's values; those that a test does not give are valid."""
    fine = {"provider_type": "Email", "provider_name": "Acme Mail", "host": URL}
    return cast("Values", fine | others)


def some(**given: Any) -> Values:
    return cast("Values", given)


def stored(environment: Environment) -> list[Row]:
    """Return every row of the table with all columns."""
    with connect(environment) as connection:
        cursor = connection.execute("SELECT * FROM notification_preferences ORDER BY id")
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def execute(environment: Environment, statement: str) -> None:
    with connect(environment) as connection:
        connection.execute(statement)


@contextmanager
def changing(environment: Environment) -> Iterator[psycopg.Connection[Any]]:
    """Hold a transaction that has written to the table."""
    with connect(environment) as connection, connection.transaction():
        connection.execute("UPDATE notification_preferences SET priority = priority")
        yield connection


def refusal(act: Callable[..., object], *args: object) -> str:
    """Return the message with which `act` refuses; it must be one line."""
    with pytest.raises(Refused) as refused:
        act(*args)
    message = str(refused.value)
    assert "\n" not in message
    return message


def refused_for(database: Environment, wrong: Values) -> str:
    """Return the message with which both `add` and `edit` refuse the values `wrong`."""
    owner = database_of(database)
    catalogue.add(owner, values())
    before = stored(database)
    message = refusal(catalogue.add, owner, values(host=OTHER_URL) | wrong)
    assert refusal(catalogue.edit, owner, 1, wrong) == message
    assert stored(database) == before
    return message


def ids(entries: list[Entry]) -> list[int]:
    return [entry.id for entry in entries]


def test_a_row_is_stored_as_given_and_shown_without_its_secret(
    owner: Database, database: Environment
) -> None:
    entry = catalogue.add(owner, values(priority=7, secret_key=SECRET))
    (row,) = stored(database)
    created_at = row.pop("created_at").astimezone(UTC)
    assert row == values(priority=7, secret_key=SECRET) | {"id": 1, "deleted_at": None}
    assert asdict(entry) == {
        "id": 1,
        "channel": "Email",
        "name": "Acme Mail",
        "host": URL,
        "priority": 7,
        "has_secret": True,
        "created_at": created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "deleted_at": None,
        "state": "active",
        "problem": None,
    }
    assert SECRET not in repr(entry)
    assert catalogue.entries(owner) == [entry]


def test_a_row_needs_neither_priority_nor_secret(owner: Database, database: Environment) -> None:
    entry = catalogue.add(owner, values(provider_type="PushNotification"))
    assert (entry.channel, entry.priority, entry.has_secret) == ("PushNotification", 0, False)
    (row,) = stored(database)
    assert (row["priority"], row["secret_key"]) == (0, None)


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "http://mail.example.com",
        "HTTP://MAIL.example.com:8080/a?b=c&d=%20",
        "http://127.0.0.1:9090/",
        "https://[::1]:8443/send",
        "https://m\u00fcnchen.example/gr\u00fc\u00dfe",
        "http://mock-providers:9090/",
        "http://mail.example.com/@me",
        "http://mail.example.com/?to=me@example.com",
    ],
)
def test_a_url_that_the_service_can_call_is_stored_unchanged(
    url: str, owner: Database, database: Environment
) -> None:
    catalogue.add(owner, values(host=url))
    assert stored(database)[0]["host"] == url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        *[
            (url, "expected an http or https URL with a host")
            for url in (
                "",
                "mail.example.com/send",
                "//mail.example.com/send",
                "ftp://mail.example.com/",
                "http://",
                "http:///send",
                "https://:443/",
                "http://mail.example.com:0/",
                "http://mail.example.com:65536/",
                "http://mail.example.com:port/",
                "http://*.example.com/",  # only the library requests refuses it
                "http://[::1/",
                "ahttps://]",
                "xn--http://][http://%25",
                f"http://mail.example.com/{'a' * 2048}",
            )
        ],
        *[
            (url, "without spaces, control characters, backslashes or #")
            for url in (
                " http://mail.example.com/",
                "http://mail.example.com/a b",
                "http://mail.example.com/\n",
                "http://mail.example.com/\x1b[31m",
                "http://mail.example.com/\u202e",
                "http://mail.example.com\\@else.example.com/",
                "http://mail.example.com/#fragment",
                "http://mail.example.com/#",
                "http://mail.example.com/\udcff",
            )
        ],
        *[
            (url, "without user and password")
            for url in (
                "http://user:p4ssword@mail.example.com/",
                "http://user@mail.example.com/",
                "http://:p4ssword@mail.example.com/",
                "http://@mail.example.com/",
                "http://user:p4ssword\u20ac@mail.example.com/",
            )
        ],
    ],
)
def test_any_other_url_is_refused_without_quoting_its_password(
    url: str, expected: str, database: Environment
) -> None:
    message = refused_for(database, some(host=url))
    assert message.startswith("the host cannot be used: ")
    assert expected in message
    assert "p4ssword" not in message


@pytest.mark.parametrize("name", ["A", "n" * 100, "Gr\u00fc\u00dfe \u2713 \U0001f4e7"])
def test_a_name_may_be_any_printable_text(
    name: str, owner: Database, database: Environment
) -> None:
    assert catalogue.add(owner, values(provider_name=name)).name == name
    assert stored(database)[0]["provider_name"] == name


@pytest.mark.parametrize(
    "name", ["", " ", "n" * 101, "a\nb", "a\tb", "\x1b[2J", "a\0b", "a\u202eb", "a\udcffb"]
)
def test_a_name_that_is_blank_too_long_or_not_printable_is_refused(
    name: str, database: Environment
) -> None:
    message = refused_for(database, some(provider_name=name))
    assert message == "the name cannot be used: expected 1 to 100 printable characters"


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
def test_any_priority_that_fits_the_column_is_accepted(priority: int, owner: Database) -> None:
    assert catalogue.add(owner, values(priority=priority)).priority == priority


@pytest.mark.parametrize("priority", [-(2**31) - 1, 2**31, 10**30])
def test_a_priority_outside_the_columns_range_is_refused(
    priority: int, database: Environment
) -> None:
    message = refused_for(database, some(priority=priority))
    assert message == "the priority cannot be used: expected -2147483648 to 2147483647"


@pytest.mark.parametrize("secret", [" x ", "a\nb", "\u00fc\u2713", "k" * 16384])
def test_a_secret_is_stored_unchanged(secret: str, owner: Database, database: Environment) -> None:
    assert catalogue.add(owner, values(secret_key=secret)).has_secret
    assert stored(database)[0]["secret_key"] == secret


@pytest.mark.parametrize("secret", ["", " ", "\n", "s3cr3t\0", "s3cr3t\udcff", "s3cr3t" * 3000])
def test_a_secret_that_is_empty_too_long_or_not_text_is_refused_and_not_quoted(
    secret: str, database: Environment
) -> None:
    message = refused_for(database, some(secret_key=secret))
    assert message.startswith("the secret ")
    assert "s3cr3t" not in message


@pytest.mark.parametrize("channel", ["email", "Sms", ""])
def test_an_unknown_channel_is_refused(channel: str, database: Environment) -> None:
    message = refused_for(database, some(provider_type=channel))
    assert message == "the channel is unknown: expected Email or PushNotification"


SAME = [
    ("https://mail.example.com/v1/send", "https://mail.example.com/v1/send"),
    ("https://mail.example.com/v1/send", "HTTPS://Mail.EXAMPLE.com:443/v1/send"),
    ("http://mail.example.com", "http://mail.example.com:80/"),
    ("http://mail.example.com/?", "http://mail.example.com"),
    (" http://mail.example.com/ ", "http://mail.example.com/"),  # a row inserted by hand
    ("http://[::1]/", "http://[::1]:80"),
    ("https://m\u00fcnchen.example/", "https://xn--mnchen-3ya.example/"),
]
DIFFERENT = [
    ("https://mail.example.com/v1/send", "http://mail.example.com/v1/send"),
    ("https://mail.example.com/v1/send", "https://mail.example.com/v1/Send"),
    ("https://mail.example.com/v1/send", "https://mail.example.com/v1/send/"),
    ("https://mail.example.com/v1/send", "https://mail.example.com/v1/send?key=1"),
    ("https://mail.example.com/v1/send", "https://mail.example.com:8443/v1/send"),
    ("https://mail.example.com/v1/send", "https://mail2.example.com/v1/send"),
    ("http://mail.example.com:443/", "https://mail.example.com/"),
    ("nonsense", "http://nonsense/"),
]


@pytest.mark.parametrize(("present", "url"), SAME)
def test_a_change_that_duplicates_an_active_rows_channel_and_url_is_refused(
    present: str, url: str, owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(present)
    edited = add_provider(OTHER_URL)
    moved = add_provider(url, "PushNotification")
    before = stored(database)
    assert {
        refusal(catalogue.add, owner, values(host=url)),
        refusal(catalogue.edit, owner, edited, some(host=url)),
        refusal(catalogue.edit, owner, moved, some(provider_type="Email")),
    } == {"provider 1 is active and has the same channel and URL"}
    assert stored(database) == before


@pytest.mark.parametrize(("present", "url"), DIFFERENT)
def test_a_row_with_a_different_url_can_be_added(
    present: str, url: str, owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(present)
    added = catalogue.add(owner, values(host=url))
    assert (added.id, added.state) == (2, "active")
    assert [row["host"] for row in stored(database)] == [present, url]


def test_a_url_of_the_other_channel_or_of_a_removed_row_can_be_added(
    owner: Database, add_provider: AddProvider
) -> None:
    other = add_provider(URL, "PushNotification")
    removed = add_provider(URL, "Email")
    catalogue.remove(owner, removed)
    added = catalogue.add(owner, values(host=URL))
    states = {entry.id: entry.state for entry in catalogue.entries(owner)}
    assert states == {other: "active", removed: "removed", added.id: "active"}


@pytest.mark.parametrize(
    "given",
    [
        {"provider_type": "PushNotification"},
        {"provider_name": "Another name"},
        {"host": OTHER_URL},
        {"host": URL.replace("mail", "MAIL")},  # a row does not conflict with itself
        {"priority": -3},
        {"secret_key": "an0ther-key"},
        {"secret_key": None},
        {"provider_name": "Another name", "priority": 9, "secret_key": None},
    ],
    ids=" ".join,
)
def test_an_edit_changes_only_the_given_columns(
    given: Row, owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    for url in (URL, "https://third.example.com/"):
        add_provider(url, priority=5)
    changed, untouched = stored(database)
    entry = catalogue.edit(owner, 1, cast("Values", given))
    assert stored(database) == [changed | given, untouched]
    assert entry in catalogue.entries(owner)


def test_rows_that_are_duplicates_already_can_be_edited_in_other_columns(
    owner: Database, add_provider: AddProvider
) -> None:
    for _ in range(2):
        add_provider(URL)
    assert catalogue.edit(owner, 2, some(priority=4)).priority == 4


def test_a_removed_row_is_checked_for_duplicates_only_when_it_is_restored(
    owner: Database, add_provider: AddProvider
) -> None:
    add_provider(URL)
    removed = add_provider(OTHER_URL)
    catalogue.remove(owner, removed)
    entry = catalogue.edit(owner, removed, some(host=URL))
    assert (entry.host, entry.state) == (URL, "removed")
    assert "same channel and URL" in refusal(catalogue.restore, owner, removed)
    catalogue.edit(owner, removed, some(host=OTHER_URL))
    assert catalogue.restore(owner, removed).state == "active"


def test_a_removed_row_stays_in_the_table_and_is_restored_unchanged(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(URL)
    (before,) = stored(database)
    removed = catalogue.remove(owner, 1)
    (row,) = stored(database)
    deleted_at = row["deleted_at"].astimezone(UTC)
    assert row | {"deleted_at": None} == before
    assert removed.state == "removed"
    assert removed.deleted_at == deleted_at.strftime("%Y-%m-%dT%H:%M:%SZ")
    restored = catalogue.restore(owner, 1)
    assert (restored.state, restored.deleted_at) == ("active", None)
    assert stored(database) == [before]


def test_removing_a_removed_row_or_restoring_an_active_one_is_refused(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(URL)
    assert refusal(catalogue.restore, owner, 1) == "provider 1 is not removed"
    catalogue.remove(owner, 1)
    before = stored(database)
    assert refusal(catalogue.remove, owner, 1) == "provider 1 is already removed"
    assert stored(database) == before


@pytest.mark.parametrize("entry_id", [2, 0, -1, 2**63, 10**40])
def test_an_unknown_id_is_refused(
    entry_id: int, owner: Database, add_provider: AddProvider
) -> None:
    add_provider(URL)
    assert {
        refusal(catalogue.edit, owner, entry_id, some(priority=1)),
        refusal(catalogue.remove, owner, entry_id),
        refusal(catalogue.restore, owner, entry_id),
        refusal(catalogue.provider, owner, entry_id),
    } == {f"there is no provider {entry_id}"}


def test_an_edit_without_values_is_refused(owner: Database, add_provider: AddProvider) -> None:
    add_provider(URL)
    assert refusal(catalogue.edit, owner, 1, some()) == "nothing to change: give at least one value"


def test_a_row_whose_url_cannot_be_called_is_not_restored(
    owner: Database, add_provider: AddProvider
) -> None:
    catalogue.remove(owner, add_provider("nonsense"))
    assert refusal(catalogue.restore, owner, 1).startswith("the host cannot be used")


def test_the_list_is_sorted_by_channel_and_by_the_order_of_attempts(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    for channel in ("PushNotification", "Email"):
        for number, priority in enumerate((3, -1, 3, 0, None)):
            add_provider(f"http://a/{number}", channel, priority=cast("int", priority))
    for removed in (4, 9):
        catalogue.remove(owner, removed)
    assert ids(catalogue.entries(owner)) == [7, 6, 8, 10, 9, 2, 1, 3, 5, 4]
    preferences = Preferences(Database(Settings.from_env(database)), 60)
    for channel in Channel:
        active = catalogue.entries(owner, channel=channel, active=True)
        tried = preferences.for_channel(channel, time.monotonic() + 10)
        assert ids(active) == [provider.id for provider in tried]
        assert len(active) == 4
    assert ids(catalogue.entries(owner, active=True)) == [7, 6, 8, 10, 2, 1, 3, 5]
    assert ids(catalogue.entries(owner, channel="Email")) == [7, 6, 8, 10, 9]


def test_rows_inserted_by_hand_are_listed_whatever_they_hold(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    execute(database, "ALTER TYPE notification_provider_type ADD VALUE 'Sms'")
    for url in ("no URL \x1b[2J", "", "http://a/"):
        add_provider(url, "Sms", name="\x1b]0;title\x07\n", priority=cast("int", None))
    execute(
        database,
        "UPDATE notification_preferences SET secret_key = '', created_at = NULL WHERE id = 1;"
        "UPDATE notification_preferences SET created_at = 'infinity', deleted_at = '-infinity'"
        " WHERE id = 3",
    )
    first, second, third = catalogue.entries(owner)
    assert (first.channel, first.name, first.host) == (
        "Sms",
        "\x1b]0;title\x07\n",
        "no URL \x1b[2J",
    )
    assert (first.priority, first.created_at, first.has_secret) == (None, None, False)
    assert second.host == ""
    assert (third.created_at, third.deleted_at, third.state) == (None, None, "removed")
    assert catalogue.restore(owner, 3).state == "active"
    assert catalogue.edit(owner, 1, some(provider_name="now printable")).channel == "Sms"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:p4ssword@mail.example.com/a", "http://***@mail.example.com/a"),
        ("user:p4ssword@mail.example.com", "***@mail.example.com"),
        ("//user:p4@ssword@mail.example.com/", "//***@mail.example.com/"),
        (
            "http://mail.example.com/?to=me@example.com",
            "http://mail.example.com/?to=me@example.com",
        ),
    ],
)
def test_a_password_in_the_url_of_a_row_is_masked(
    url: str, shown: str, owner: Database, add_provider: AddProvider
) -> None:
    add_provider(url)
    assert [entry.host for entry in catalogue.entries(owner)] == [shown]


def test_the_provider_of_a_row_has_its_secret_and_its_whole_url(
    owner: Database, add_provider: AddProvider
) -> None:
    url = "http://user:p4ssword@mail.example.com/a"
    catalogue.remove(owner, add_provider(url, secret_key=SECRET))
    entry, provider = catalogue.provider(owner, 1)
    assert (entry.state, entry.host) == ("removed", "http://***@mail.example.com/a")
    assert (provider.id, provider.url, provider.secret_key) == (1, url, SECRET)


def test_a_row_of_an_unknown_channel_cannot_be_used_as_a_provider(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    execute(database, "ALTER TYPE notification_provider_type ADD VALUE 'Sms'")
    add_provider(URL, "Sms")
    message = "provider 1 cannot be used: provider_type: unknown channel"
    assert refusal(catalogue.provider, owner, 1) == message


def waiting(environment: Environment) -> list[str]:
    """Return the statements that wait for another session's lock."""
    with connect(environment) as connection:
        found = connection.execute(
            "SELECT query FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return [query for (query,) in found]


def test_two_operators_cannot_add_the_same_row_at_once(
    owner: Database, database: Environment
) -> None:
    ended: list[str] = []
    add = threading.Thread(target=lambda: ended.append(refusal(catalogue.add, owner, values())))
    with changing(database) as other:
        add.start()
        eventually(lambda: waiting(database))
        other.execute(
            "INSERT INTO notification_preferences (provider_type, provider_name, host)"
            " VALUES ('Email', 'the first', %s)",
            (URL,),
        )
    add.join(20)
    assert ended == ["provider 1 is active and has the same channel and URL"]
    assert [row["provider_name"] for row in stored(database)] == ["the first"]


def test_an_operator_who_waits_too_long_for_another_is_refused(
    owner: Database, database: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "LOCK_WAIT", "200ms")
    with changing(database), within(5):
        message = refusal(catalogue.add, owner, values())
    assert message == "another change of the providers has been running for 200ms; try again later"


def test_readers_do_not_wait_for_a_change(
    owner: Database, database: Environment, add_provider: AddProvider
) -> None:
    add_provider(URL)
    with catalogue._changing(owner), within(1.5):
        assert ids(catalogue.entries(owner)) == [1]
        preferences = Preferences(Database(Settings.from_env(database)), 60)
        assert preferences.for_channel(Channel.EMAIL, time.monotonic() + 1)


ACTS: dict[str, Callable[[Database], object]] = {
    "entries": catalogue.entries,
    "provider": lambda database: catalogue.provider(database, 1),
    "add": lambda database: catalogue.add(database, values(host=OTHER_URL)),
    "edit": lambda database: catalogue.edit(database, 1, some(priority=1)),
    "remove": lambda database: catalogue.remove(database, 1),
    "restore": lambda database: catalogue.restore(database, 1),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "granted", ["", "SELECT", "SELECT, UPDATE", "SELECT, INSERT", "SELECT, INSERT, UPDATE"]
)
def test_the_refusal_names_the_privileges_that_the_role_lacks(
    act: str, granted: str, database: Environment, add_provider: AddProvider
) -> None:
    needed = {"entries": "SELECT", "provider": "SELECT", "add": "SELECT, INSERT, UPDATE"}
    lacking = [
        privilege
        for privilege in needed.get(act, "SELECT, UPDATE").split(", ")
        if privilege not in granted
    ]
    add_provider(URL)
    if act == "restore":
        catalogue.remove(database_of(database), 1)
    role = make_role(database, granted)
    if lacking:
        assert refusal(ACTS[act], database_of(role)) == (
            f"{role['DB_USERNAME']} lacks {' and '.join(lacking)} on notification_preferences: set"
            " DB_MIGRATION_USERNAME and DB_MIGRATION_PASSWORD to the role that owns it"
        )
    else:
        ACTS[act](database_of(role))


def make_role(database: Environment, granted: str) -> Environment:
    """Return the `DB_*` variables of a new role with the privileges `granted` on the table."""
    name = f"role_of_{database['DB_NAME']}"
    execute(database, f"CREATE ROLE {name} LOGIN PASSWORD 'r0les-password'")
    if granted:
        execute(
            database,
            f"GRANT {granted} ON notification_preferences TO {name};"
            f"GRANT USAGE ON SEQUENCE notification_preferences_id_seq TO {name}",
        )
    return one_role(database, name, "r0les-password")


@pytest.mark.parametrize("act", ACTS)
def test_without_the_table_the_refusal_says_to_migrate(
    act: str, empty_database: Environment
) -> None:
    assert refusal(ACTS[act], database_of(empty_database)) == (
        "there is no table notification_preferences: run flask --app notifier.app migrate"
    )
