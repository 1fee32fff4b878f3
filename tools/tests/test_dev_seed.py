"""The mock providers' rows: added to an empty table only, and moved with their ports."""

import subprocess
import sys

import pytest

from notifier.settings import Settings
from notifier.store.db import Database
from tests.fixtures import Environment, connect
from tests.service import ROOT, clean_environment
from tools.dev import seed as seeding


def seed(environment: Environment) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tools.dev.seed", "mocks.example"],
        cwd=ROOT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def rows(environment: Environment) -> list[tuple[object, ...]]:
    query = (
        "SELECT provider_type, provider_name, host, priority, deleted_at"
        " FROM notification_preferences ORDER BY id"
    )
    with connect(environment) as connection:
        return connection.execute(query).fetchall()


def test_an_empty_table_gets_the_four_mock_providers_once(database):
    first, second = seed(database), seed(database)
    assert (first.returncode, first.stdout) == (0, "added the mock providers\n")
    assert (second.returncode, second.stdout) == (0, "there are providers already\n")
    assert rows(database) == [
        ("Email", "email 1", "http://mocks.example:9090/", 0, None),
        ("Email", "email 2", "http://mocks.example:9091/", 1, None),
        ("PushNotification", "push 1", "http://mocks.example:9092/", 0, None),
        ("PushNotification", "push 2", "http://mocks.example:9093/", 1, None),
    ]


def test_an_owner_that_serves_too_adds_them_as_well(database):
    both = {
        "DB_USERNAME": database.pop("DB_MIGRATION_USERNAME"),
        "DB_PASSWORD": database.pop("DB_MIGRATION_PASSWORD"),
    }
    assert seed(database | both).stdout == "added the mock providers\n"


def test_each_mock_provider_gets_a_secret_of_its_own(database):
    seed(database)
    with connect(database) as connection:
        query = "SELECT count(DISTINCT secret_key) FROM notification_preferences"
        assert connection.execute(query).fetchone() == (4,)


def test_a_table_with_a_row_stays_as_it_is(database, add_provider):
    add_provider("http://127.0.0.1:1/")
    with connect(database) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    before = rows(database)
    assert seed(database).returncode == 0
    assert rows(database) == before


def moved(environment: Environment, first: int) -> list[str]:
    """Move the rows to four ports, from the first on; return the names of the moved ones."""
    database = Database.migrating(Settings.from_env(environment))
    return seeding.move_rows(database, seeding.from_port(first), "127.0.0.1")


@pytest.fixture
def seeded(database: Environment) -> Environment:
    """A database with the rows that `make run` adds."""
    migrating = Database.migrating(Settings.from_env(database))
    assert seeding.add_rows(migrating, seeding.PROVIDERS, "127.0.0.1")
    return database


def test_rows_follow_the_mock_providers_to_other_ports_and_back(seeded: Environment) -> None:
    before = rows(seeded)
    assert moved(seeded, 9091) == ["email 1", "email 2", "push 1", "push 2"]
    assert [row[2] for row in rows(seeded)] == [
        f"http://127.0.0.1:{port}/" for port in (9091, 9092, 9093, 9094)
    ]
    assert moved(seeded, 9091) == []
    moved(seeded, 9090)
    assert rows(seeded) == before


def test_a_removed_row_follows_as_well(seeded: Environment) -> None:
    with connect(seeded) as connection:
        connection.execute("UPDATE notification_preferences SET deleted_at = now()")
    assert len(moved(seeded, 7000)) == 4


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("provider_name", "my email"),
        ("provider_type", "PushNotification"),
        ("host", "http://127.0.0.1:9090/v1"),
        ("host", "http://localhost:9090/"),
        ("host", "https://127.0.0.1:9090/"),
        ("host", "http://127.0.0.1/"),
        ("host", "http://127.0.0.1:5000/"),
        ("host", "http://127x0.0.1:9090/"),
    ],
)
def test_a_row_that_somebody_added_or_edited_stays(
    seeded: Environment, column: str, value: str
) -> None:
    statement = f"UPDATE notification_preferences SET {column} = %s WHERE provider_name = 'email 1'"
    with connect(seeded) as connection:
        connection.execute(statement.encode(), [value])
    before = rows(seeded)[0]
    assert moved(seeded, 7000) == ["email 2", "push 1", "push 2"]
    assert rows(seeded)[0] == before


@pytest.mark.parametrize(
    "urls",
    [
        ("http://127.0.0.1:9090/", "http://127.0.0.1:5000/", "https://a/", "https://b/"),
        ("http://127.0.0.1:5000/", "https://a/", "https://b/", "https://c/"),
    ],
)
def test_rows_whose_ports_do_not_agree_stay(seeded: Environment, urls: tuple[str, ...]) -> None:
    with connect(seeded) as connection:
        statement = "UPDATE notification_preferences SET host = %s WHERE provider_name = %s"
        for mock, url in zip(seeding.PROVIDERS, urls, strict=True):
            connection.execute(statement, [url, mock.name])
    before = rows(seeded)
    assert moved(seeded, 7000) == []
    assert rows(seeded) == before


def test_rows_of_the_mock_providers_are_found_by_their_urls(seeded: Environment) -> None:
    database = Database.migrating(Settings.from_env(seeded))
    assert seeding.has_rows(database, seeding.PROVIDERS, "127.0.0.1")
    assert not seeding.has_rows(database, seeding.from_port(7000), "127.0.0.1")


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"DB_PASSWORD": ""}, "seed: DB_PASSWORD is missing: expected text, or "),
        ({"DB_NAME": "none"}, "seed: PostgreSQL: "),
    ],
)
def test_an_error_is_one_line(database, variables, line):
    failed = seed(database | variables)
    assert failed.returncode == 1
    assert failed.stderr.startswith(line)
    assert failed.stderr.count("\n") == 1
