"""A bad row harms only itself: it is skipped and named, and all other rows are used."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from click.testing import Result

from notifier.app import create_app
from notifier.errors import Refused
from notifier.models import Channel
from notifier.settings import Settings
from notifier.sharing.snapshot import Snapshot
from notifier.store import catalogue, migrations
from notifier.store.db import Database
from notifier.store.handover import Handover
from notifier.store.preferences import QUERY, Preferences
from notifier.store.rows import LIMITS
from notifier.store.values import Values
from tests.fixtures import (
    Environment,
    Growth,
    MakeProvider,
    connect,
    create_database,
    insert_provider,
    one_role,
)
from tests.refreshed import Refreshed, wait_until_listening
from tests.service import Service
from tests.timing import eventually

Logged = tuple[int | str | None, str, str]

ACUTE = "caf\udce9"  # é in Latin-1, as a file name or a psycopg parameter would carry it
NO_TEXT = "not UTF-8 text"

# A table made by hand, without any constraint.
BY_HAND = """
    CREATE TABLE notification_preferences (
        id bigint, provider_type text, provider_name varchar, host text, priority int,
        secret_key text, created_at timestamptz, deleted_at timestamptz)
"""


def execute(environment: Environment, statement: str) -> None:
    """Execute a statement whose surrogates stand for bytes, which PostgreSQL must not convert."""
    with connect(environment) as connection:
        connection.execute("SET client_encoding TO sql_ascii")
        connection.execute(statement.encode(errors="surrogateescape"))


def encoded_database(server: Environment, encoding: str) -> Environment:
    """Return a migrated database in `encoding`."""
    environment = create_database(server)
    name = f"{encoding.lower()}_{environment['DB_NAME']}"
    create = f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
    execute(server, f"{create} LOCALE_PROVIDER libc")
    environment |= {"DB_NAME": name}
    migrations.migrate(Settings.from_env(environment))
    return environment


@pytest.fixture
def without_encoding(server: Environment) -> Environment:
    """A database that takes any bytes for text."""
    return encoded_database(server, "SQL_ASCII")


@pytest.fixture
def snapshot() -> Iterator[Snapshot]:
    made = Snapshot()
    yield made
    made.close()


def read(environment: Environment, known: Preferences | None = None) -> list[int]:
    """Return the ids of all rows that become providers, by channel."""
    database = Database(Settings.from_env(environment))
    known = known or Preferences(database, 600)
    with database.connect() as connection:
        assert known.reload(connection)
    return [one.id for channel in Channel for one in known.for_channel(channel, 0)]


def skipped(caplog: pytest.LogCaptureFixture) -> list[Logged]:
    """Return the id, the column and the problem of each row that the log names."""
    return [
        (fields["provider_id"], fields["column"], fields["problem"])
        for record in caplog.records
        if record.msg == "provider row skipped" and (fields := record.__dict__)
    ]


def problems(environment: Environment) -> dict[int | str | None, str | None]:
    return {one.id: one.problem for one in catalogue.entries(owner_of(environment))}


def owner_of(environment: Environment) -> Database:
    return Database.migrating(Settings.from_env(environment))


def run(environment: Environment, *command: str) -> Result:
    app = create_app(Settings.from_env(environment))
    return app.test_cli_runner().invoke(args=["providers", *command])


def change(environment: Environment, entry_id: int, column: str, value: str) -> None:
    """Set a column of a row to an SQL expression."""
    execute(
        environment,
        f"UPDATE notification_preferences SET {column} = {value} WHERE id = {entry_id}",
    )


# --- bytes that are no text


@pytest.mark.parametrize("column", ["provider_name", "host", "secret_key"])
def test_a_row_whose_bytes_are_no_utf_8_is_skipped_and_named(
    column: str, without_encoding: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("Grüße", "bad", "good"):
        insert_provider(without_encoding, f"http://{name}/", name=name)
    change(without_encoding, 2, column, f"'http://a/{ACUTE}'")
    assert read(without_encoding) == [1, 3]
    assert skipped(caplog) == [(2, column, NO_TEXT)]
    assert "http://a/" not in caplog.text
    assert problems(without_encoding) == {1: None, 2: f"{column}: {NO_TEXT}", 3: None}


def test_a_channel_whose_bytes_are_no_utf_8_harms_only_its_rows(
    without_encoding: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    execute(without_encoding, f"ALTER TYPE notification_provider_type ADD VALUE '{ACUTE}'")
    for _ in range(2):
        insert_provider(without_encoding, "http://a/")
    change(without_encoding, 1, "provider_type", f"'{ACUTE}'")
    assert read(without_encoding) == [2]
    assert skipped(caplog) == [(1, "provider_type", NO_TEXT)]
    (bad, good) = catalogue.entries(owner_of(without_encoding))[::-1]
    assert (bad.channel, good.channel) == (r"caf\xe9", "Email")


def test_a_notification_whose_bytes_are_no_utf_8_does_not_end_the_listening_connection(
    without_encoding: Environment, growth: Growth
) -> None:
    """PostgreSQL ends a connection if it cannot convert the payload."""
    execute(without_encoding, f"ALTER TYPE notification_provider_type ADD VALUE '{ACUTE}'")
    with Refreshed(without_encoding, 600) as refreshed:
        wait_until_listening()
        insert_provider(without_encoding, "http://a/", "Email")
        eventually(lambda: refreshed.ids() == [1])
        for priority in range(5):
            change(without_encoding, 1, "provider_type", f"'{ACUTE}'")
            eventually(lambda: refreshed.ids() == [])
            change(without_encoding, 1, "provider_type", f"'Email', priority = {priority}")
            eventually(lambda: refreshed.ids() == [1])
    assert growth("preference_notifications_total")[()] >= 10
    assert growth("preference_listener_reconnects_total") == {}


@pytest.mark.parametrize(
    ("encoding", "name", "bad"),
    [("WIN1252", "€", "\udc81"), ("LATIN1", "ñ", None), ("EUC_JP", "Ж", None)],
)
def test_texts_in_the_databases_own_encoding_are_decoded_each_by_itself(
    encoding: str,
    name: str,
    bad: str | None,
    server: Environment,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """WIN1252 assigns no character to the byte 0x81, but PostgreSQL stores it."""
    environment = encoded_database(server, encoding)
    for _ in range(2):
        insert_provider(environment, "http://a/", name=name)
    if bad:
        change(environment, 2, "provider_name", f"'{bad}'")
    known = Preferences(Database(Settings.from_env(environment)), 600)
    assert read(environment, known) == ([1] if bad else [1, 2])
    assert known.for_channel(Channel.EMAIL, 0)[0].name == name
    assert skipped(caplog) == ([(2, "provider_name", NO_TEXT)] if bad else [])
    assert catalogue.edit(owner_of(environment), 2, {"provider_name": name}).name == name
    assert read(environment) == [1, 2]


def test_a_character_that_the_databases_encoding_lacks_is_refused(server: Environment) -> None:
    environment = encoded_database(server, "LATIN1")
    insert_provider(environment, "http://a/")
    with pytest.raises(Refused, match="the encoding of the database lacks a character"):
        catalogue.edit(owner_of(environment), 1, {"provider_name": "Łódź"})


def test_a_database_whose_encoding_python_lacks_is_read_as_before(server: Environment) -> None:
    environment = encoded_database(server, "EUC_TW")
    insert_provider(environment, "http://a/", name="中文")
    (entry,) = catalogue.entries(owner_of(environment))
    assert (read(environment), entry.name) == ([1], "中文")


# --- values that the service does not know or cannot hold


def test_a_row_of_an_unknown_channel_is_skipped_and_named(
    database: Environment,
    add_provider: Callable[..., int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    execute(database, "ALTER TYPE notification_provider_type ADD VALUE 'Sms' BEFORE 'Email'")
    add_provider("http://a/", "Sms", priority=-1)
    email = add_provider("http://b/")
    assert read(database) == [email]
    assert skipped(caplog) == [(1, "provider_type", "unknown channel")]
    assert problems(database) == {1: "provider_type: unknown channel", email: None}


def test_a_type_that_lacks_a_channel_is_no_obstacle(
    empty_database: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    execute(empty_database, "CREATE TYPE notification_provider_type AS ENUM ('Email')")
    migrations.migrate(Settings.from_env(empty_database))
    insert_provider(empty_database, "http://a/")
    assert (read(empty_database), skipped(caplog)) == ([1], [])


@pytest.fixture
def by_hand(empty_database: Environment) -> Environment:
    """A database whose table has no constraint; a single role owns it and serves."""
    execute(empty_database, BY_HAND)
    return one_role(empty_database)


def insert_by_hand(environment: Environment, entry_id: int, **columns: str) -> None:
    """Insert a row of SQL expressions."""
    row = {
        "id": str(entry_id),
        "provider_type": "'Email'",
        "provider_name": "'mailer'",
        "host": "'http://a/'",
    } | columns
    table = f"notification_preferences ({', '.join(row)})"
    execute(environment, f"INSERT INTO {table} VALUES ({', '.join(row.values())})")


@pytest.mark.parametrize("column", ["provider_name", "host", "secret_key"])
def test_a_text_is_read_up_to_a_limit(
    column: str, by_hand: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    most = LIMITS[column]
    for entry_id, length in ((1, most), (2, most + 1), (3, 3_000_000)):
        insert_by_hand(by_hand, entry_id, **{column: f"repeat('x', {length})"})
    problem = f"longer than {most} bytes"
    assert read(by_hand) == [1]
    assert skipped(caplog) == [(2, column, problem), (3, column, problem)]
    assert problems(by_hand) == {1: None, 2: f"{column}: {problem}", 3: f"{column}: {problem}"}


def test_a_text_of_megabytes_does_not_leave_postgresql(by_hand: Environment) -> None:
    execute(by_hand, "ALTER TABLE notification_preferences ALTER id TYPE text")
    for column in LIMITS:
        insert_by_hand(by_hand, 1, **{column: "repeat('x', 3000000)"})
    with Database(Settings.from_env(by_hand)).connect() as connection:
        assert len(str(connection.execute(QUERY).fetchall())) < 2000


@pytest.mark.parametrize("column", ["id", "provider_type", "provider_name", "host"])
def test_a_row_that_lacks_a_value_is_skipped_and_named(
    column: str, by_hand: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    insert_by_hand(by_hand, 1, **{column: "NULL"})
    insert_by_hand(by_hand, 2)
    assert read(by_hand) == [2]
    named = None if column == "id" else 1
    assert skipped(caplog) == [(named, column, "missing")]
    assert problems(by_hand) == {named: f"{column}: missing", 2: None}


@pytest.mark.parametrize(
    ("time", "shown"),
    [
        ("infinity", None),
        ("-infinity", None),
        ("0044-03-15 12:00:00+00 BC", "0044-03-15T12:00:00Z BC"),
        ("294276-12-31 23:59:59+00", "294276-12-31T23:59:59Z"),
        ("4713-01-01 00:00:00+00 BC", "4713-01-01T00:00:00Z BC"),
        ("0001-01-01 00:00:00+00", "0001-01-01T00:00:00Z"),
    ],
)
def test_a_time_that_python_cannot_hold_is_listed_and_harms_nothing(
    time: str, shown: str | None, database: Environment, add_provider: Callable[..., int]
) -> None:
    add_provider("http://a/")
    change(database, 1, "created_at", f"'{time}'")
    assert read(database) == [1]
    (entry,) = catalogue.entries(owner_of(database))
    assert (entry.created_at, entry.problem) == (shown, None)
    change(database, 1, "deleted_at", f"'{time}'")
    (entry,) = catalogue.entries(owner_of(database))
    assert (entry.deleted_at, entry.state, read(database)) == (shown, "removed", [])


def test_a_name_or_secret_of_control_characters_is_used(
    database: Environment, add_provider: Callable[..., int]
) -> None:
    """JSON and Prometheus' format have escapes for them."""
    odd = "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028\u202e\ufeff"
    add_provider("http://a/", name=odd, secret_key=odd)
    assert (read(database), problems(database)) == ([1], {1: None})


@pytest.mark.parametrize("type_", ["smallint", "numeric", "text", "float8"])
def test_an_integer_is_an_id_whatever_the_columns_type(
    type_: str, by_hand: Environment, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    execute(by_hand, f"ALTER TABLE notification_preferences ALTER id TYPE {type_}")
    execute(by_hand, f"ALTER TABLE notification_preferences ALTER priority TYPE {type_}")
    insert_by_hand(by_hand, 7, priority="3")
    insert_by_hand(by_hand, 8, priority="3", host="'http://b/'")
    settings = Settings.from_env(by_hand)
    known = Preferences(Database(settings), 600)
    known.inherit(Handover(snapshot, settings))
    assert read(by_hand, known) == [7, 8]
    assert Handover(snapshot, settings).take() is not None
    assert caplog.records == []
    shown = json.loads(run(by_hand, "list", "--json").output)
    assert [(one["id"], one["priority"]) for one in shown] == [(7, 3), (8, 3)]
    owner = owner_of(by_hand)
    assert catalogue.provider(owner, 8)[1].id == 8
    assert catalogue.edit(owner, 8, {"host": "http://c/"}).host == "http://c/"
    assert catalogue.remove(owner, 8).state == "removed"
    assert catalogue.restore(owner, 8).state == "active"


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("numeric", "1.5"),
        ("numeric", "'NaN'"),
        ("text", "'mailer'"),
        ("text", "''"),
        ("text", "'\u0661'"),
        ("uuid", "'0e37df36-f698-11e6-8dd4-cb9ced3df976'"),
    ],
)
def test_a_row_whose_id_is_no_integer_is_skipped_and_named(
    type_: str, value: str, by_hand: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    execute(by_hand, "ALTER TABLE notification_preferences DROP id")
    execute(by_hand, f"ALTER TABLE notification_preferences ADD id {type_}")
    insert_by_hand(by_hand, 1, id=value)
    shown = value.strip("'")
    assert read(by_hand) == []
    assert skipped(caplog) == [(shown, "id", "not an integer")]
    (entry,) = json.loads(run(by_hand, "list", "--json").output)
    assert (entry["id"], entry["problem"]) == (shown, "id: not an integer")


def test_an_id_of_megabytes_is_neither_read_nor_logged(
    by_hand: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    execute(by_hand, "ALTER TABLE notification_preferences ALTER id TYPE text")
    insert_by_hand(by_hand, 1, id="repeat('1', 3000000)")
    insert_by_hand(by_hand, 2)
    assert read(by_hand) == [2]
    assert skipped(caplog) == [(None, "id", "longer than 100 bytes")]


def test_ids_are_numbers_to_the_order_of_attempts(by_hand: Environment) -> None:
    execute(by_hand, "ALTER TABLE notification_preferences ALTER id TYPE numeric")
    for entry_id in (10, 9, 100):
        insert_by_hand(by_hand, entry_id)
    assert read(by_hand) == [9, 10, 100]


def test_rows_of_the_same_id_are_listed_and_neither_tested_nor_changed(
    by_hand: Environment,
) -> None:
    for host in ("http://a/", "http://b/"):
        insert_by_hand(by_hand, 1, host=f"'{host}'")
    owner = owner_of(by_hand)
    before = catalogue.entries(owner)
    changes = (
        lambda: catalogue.provider(owner, 1),
        lambda: catalogue.edit(owner, 1, {"priority": 5}),
        lambda: catalogue.remove(owner, 1),
        lambda: catalogue.restore(owner, 1),
    )
    for act in changes:
        with pytest.raises(Refused, match=r"^2 rows have the id 1: give each its own id with SQL$"):
            act()
    assert catalogue.entries(owner) == before
    assert len(before) == 2


def test_a_row_is_not_added_without_an_id(by_hand: Environment) -> None:
    owner = owner_of(by_hand)
    insert_by_hand(by_hand, 1)
    with pytest.raises(Refused, match="the column id has no default"):
        catalogue.add(owner, {"provider_type": "Email", "provider_name": "b", "host": "http://b/"})
    assert [entry.id for entry in catalogue.entries(owner)] == [1]


def test_times_of_type_text_are_listed(by_hand: Environment) -> None:
    for column in ("created_at", "deleted_at"):
        execute(by_hand, f"ALTER TABLE notification_preferences ALTER {column} TYPE text")
    insert_by_hand(by_hand, 1, created_at="'yesterday'", deleted_at="'2026-01-02 03:04:05.6+00'")
    insert_by_hand(by_hand, 2, created_at="repeat('x', 3000000)")
    owner = owner_of(by_hand)
    second, first = catalogue.entries(owner)
    assert (first.created_at, first.deleted_at) == ("yesterday", "2026-01-02T03:04:05Z")
    assert (second.created_at, second.state) == (100 * "x", "active")
    assert catalogue.remove(owner, 2).state == "removed"
    assert catalogue.restore(owner, 2).state == "active"


# --- the log


def test_a_bad_row_is_logged_once_for_each_change_of_its_problem(
    database: Environment, add_provider: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    execute(database, "ALTER TYPE notification_provider_type ADD VALUE 'Sms'")
    known = Preferences(Database(Settings.from_env(database)), 600)
    bad, good = add_provider("http://a/", "Sms"), add_provider("http://b/")
    unknown = (bad, "provider_type", "unknown channel")
    for _ in range(3):
        assert read(database, known) == [good]
    assert skipped(caplog) == [unknown]
    change(database, bad, "provider_name", "repeat('x', 2000)")
    read(database, known)
    assert skipped(caplog) == [unknown, (bad, "provider_name", "longer than 1000 bytes")]
    change(database, bad, "(provider_type, provider_name)", "('Email', 'mended')")
    assert read(database, known) == [bad, good]
    change(database, bad, "provider_type", "'Sms'")
    assert read(database, known) == [good]
    assert skipped(caplog)[2:] == [unknown]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


# --- the commands and the service


def test_a_bad_row_can_be_edited_removed_and_restored_and_blocks_no_other(
    without_encoding: Environment,
) -> None:
    owner = owner_of(without_encoding)
    for name in ("one", "two", "three"):
        insert_provider(without_encoding, f"http://{name}/", name=name)
    change(without_encoding, 1, "host", f"'http://{ACUTE}/'")
    change(without_encoding, 2, "host", "repeat('x', 9000)")
    change(without_encoding, 3, "provider_name", f"'{ACUTE}'")
    added = catalogue.add(
        owner, {"provider_type": "Email", "provider_name": "four", "host": "http://four/"}
    )
    assert read(without_encoding) == [added.id]
    assert catalogue.entries(owner)[2].name == r"caf\xe9"
    with pytest.raises(Refused, match="provider 2 cannot be used: host: longer than 8192 bytes"):
        catalogue.provider(owner, 2)
    assert catalogue.edit(owner, 2, {"priority": 5}).host is None
    assert catalogue.remove(owner, 2).state == "removed"
    with pytest.raises(Refused, match="the host cannot be used"):
        catalogue.restore(owner, 2)
    assert catalogue.edit(owner, 2, {"host": "http://mended/"}).problem is None
    assert catalogue.restore(owner, 2).state == "active"
    for entry_id, values in ((1, {"host": "http://one/"}), (3, {"provider_name": "three"})):
        assert catalogue.edit(owner, entry_id, cast("Values", values)).problem is None
    assert sorted(read(without_encoding)) == [1, 2, 3, added.id]


def test_the_list_names_a_bad_row_and_its_column(
    database: Environment, add_provider: Callable[..., int]
) -> None:
    add_provider("http://a/", name="x" * 2000)
    add_provider("http://b/", name="fine")
    outputs = [run(database, "list", *option) for option in ((), ("--json",))]
    assert [output.exit_code for output in outputs] == [0, 0]
    _, bad, good = outputs[0].output.splitlines()
    assert bad.endswith("active skipped (provider_name: longer than 1000 bytes)")
    assert good.endswith("active")
    shown = {one["id"]: (one["name"], one["problem"]) for one in json.loads(outputs[1].output)}
    assert shown == {1: (None, "provider_name: longer than 1000 bytes"), 2: ("fine", None)}


def test_a_service_starts_and_delivers_beside_bad_rows(
    processes: None,
    tmp_path: Path,
    without_encoding: Environment,
    make_provider: MakeProvider,
) -> None:
    provider = make_provider()
    for number in range(4):
        insert_provider(without_encoding, provider.url, name=f"provider {number}", priority=number)
    change(without_encoding, 1, "provider_name", f"'{ACUTE}'")
    change(without_encoding, 2, "secret_key", "repeat('x', 3000000)")
    change(without_encoding, 3, "host", f"'{ACUTE}'")
    change(without_encoding, 4, "created_at", "'infinity'")
    service = Service(tmp_path, without_encoding)
    try:
        service.wait_until_ready().wait_until_listening()
        assert service.notify().status_code == 200
        named = {
            (line["provider_id"], line["column"])
            for line in service.lines()
            if line["message"] == "provider row skipped"
        }
        assert named == {(1, "provider_name"), (2, "secret_key"), (3, "host")}
    finally:
        service.stop()
