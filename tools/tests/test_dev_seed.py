"""The mock providers' rows: added to an empty table, and to no other."""

import subprocess
import sys

import pytest

from tests.fixtures import Environment, connect
from tests.service import ROOT, clean_environment


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


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"DB_PASSWORD": ""}, "seed: DB_PASSWORD is missing: expected text, or "),
        ({"DB_NAME": "none"}, "seed: PostgreSQL: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(database, variables, line):
    failed = seed(database | variables)
    assert failed.returncode == 1
    assert failed.stderr.startswith(line)
    assert failed.stderr.count("\n") == 1
