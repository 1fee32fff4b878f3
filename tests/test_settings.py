"""Settings from the environment: defaults, valid values, and the errors for invalid ones."""

import json
import os
import subprocess
import sys
from dataclasses import Field, FrozenInstanceError, fields, replace
from pathlib import Path

import certifi
import pytest

from notifier import environ as kinds
from notifier import settings as settings_module
from notifier.environ import Kind, Secret
from notifier.settings import (
    MIN_DEADLINE,
    Settings,
    SettingsError,
    available_cpus,
    settings_or_exit,
)
from notifier.variables import WITHOUT_EFFECT, unknown_variables

PASSWORD = "hunter2-p4ss"
HERE = str(Path(__file__).parent)

REQUIRED = {
    "DB_HOST": "db.example.com",
    "DB_PORT": "5432",
    "DB_NAME": "notifications",
    "DB_USERNAME": "notifier",
    "DB_PASSWORD": PASSWORD,
}

VALUES_OF_REQUIRED = {
    "db_host": "db.example.com",
    "db_port": "5432",
    "db_name": "notifications",
    "db_username": "notifier",
    "db_password": Secret(PASSWORD),
}

DEFAULTS = {
    "app_name": "notification-service",
    "log_level": "INFO",
    "http_server_host": None,
    "http_server_port": 8080,
    "http_server_keepalive": 75.0,
    "web_concurrency": min(4, available_cpus()),
    "web_threads": 32,
    "web_instances": 5,
    "drain_delay": 0.0,
    "http_client_timeout": 5.0,
    "notify_deadline": 15.0,
    "circuit_breaker_max_half_open_requests": 5,
    "circuit_breaker_open_state_timeout": 60.0,
    "circuit_breaker_min_requests_before_trip": 3,
    "circuit_breaker_failure_threshold_percent": 60,
    "circuit_breaker_window": 60.0,
    "cache_expired_time": 600.0,
    "cache_invalidation": "on",
    "allow_local_addresses": "off",
    "db_sslmode": "disable",
    "db_sslrootcert": None,
    "db_sslcert": None,
    "db_sslkey": None,
    "db_listen_host": None,
    "db_listen_port": None,
    "db_read_host": None,
    "db_read_port": None,
    "db_migration_username": None,
    "db_migration_password": None,
    "requests_ca_bundle": None,
    "curl_ca_bundle": None,
}

OPTIONAL = [name.upper() for name in DEFAULTS]

SECRETS = ["DB_PASSWORD", "DB_MIGRATION_PASSWORD"]
# For each variable: a valid text, its value, an invalid text (ANY if every text is valid), and its
# kind, or the beginning of `expected` if the kind is made for this variable.
ANY = None
COUNTS = ("7", 7, "0", kinds.COUNT)
DURATIONS = ("1m30s", 90.0, "5", kinds.DURATION)
HOSTS = ("a, b", "a,b", "a,", kinds.HOSTS)
PORTS = ("1, 2", "1,2", "0", kinds.PORTS)
FILES = (__file__, __file__, HERE, kinds.FILE)
PERCENT = "a whole number from 1 to 100"
CA_BUNDLES = (HERE, HERE, __file__, kinds.CA_BUNDLE)
VARIABLES: dict[str, tuple[str, object, str | None, Kind | str]] = {
    "APP_NAME": (" notifier-eu ", "notifier-eu", ANY, kinds.TEXT),
    "LOG_LEVEL": (" debug ", "DEBUG", "loud", "one of debug, info, warn, "),
    "HTTP_SERVER_HOST": ("::1", "::1", "localhost", kinds.ADDRESS),
    "HTTP_SERVER_PORT": (":9090", 9090, "::9090", kinds.LISTEN_PORT),
    "HTTP_SERVER_KEEPALIVE": ("0s", 0.0, "75", kinds.DELAY),
    "WEB_CONCURRENCY": ("256", 256, "257", "a whole number from 1 to 256"),
    "WEB_THREADS": ("512", 512, "513", "a whole number from 1 to 512"),
    "WEB_INSTANCES": ("10000", 10_000, "0", "a whole number from 1 to 10000"),
    "DRAIN_DELAY": ("0", 0.0, "none", kinds.DELAY),
    "HTTP_CLIENT_TIMEOUT": DURATIONS,
    "NOTIFY_DEADLINE": DURATIONS,
    "CIRCUIT_BREAKER_MAX_HALF_OPEN_REQUESTS": COUNTS,
    "CIRCUIT_BREAKER_OPEN_STATE_TIMEOUT": DURATIONS,
    "CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP": COUNTS,
    "CIRCUIT_BREAKER_FAILURE_THRESHOLD_PERCENT": ("100", 100, "101", PERCENT),
    "CIRCUIT_BREAKER_WINDOW": DURATIONS,
    "CACHE_EXPIRED_TIME": DURATIONS,
    "CACHE_INVALIDATION": ("OFF", "off", "true", kinds.SWITCH),
    "ALLOW_LOCAL_ADDRESSES": ("on", "on", "yes", kinds.SWITCH),
    "DB_HOST": HOSTS,
    "DB_PORT": PORTS,
    "DB_NAME": ("other", "other", ANY, kinds.TEXT),
    "DB_USERNAME": ("other", "other", ANY, kinds.TEXT),
    "DB_PASSWORD": (" kept as it is ", Secret(" kept as it is "), ANY, kinds.TEXT),
    "DB_SSLMODE": ("verify-ca", "verify-ca", "verify", "one of disable, allow, prefer, "),
    "DB_SSLROOTCERT": (certifi.where(), certifi.where(), __file__, kinds.ROOT_CERT),
    "DB_SSLCERT": FILES,
    "DB_SSLKEY": FILES,
    "DB_LISTEN_HOST": HOSTS,
    "DB_LISTEN_PORT": PORTS,
    "DB_READ_HOST": HOSTS,
    "DB_READ_PORT": PORTS,
    "DB_MIGRATION_USERNAME": ("other", "other", ANY, kinds.TEXT),
    "DB_MIGRATION_PASSWORD": (" kept as it is ", Secret(" kept as it is "), ANY, kinds.TEXT),
    "REQUESTS_CA_BUNDLE": CA_BUNDLES,
    "CURL_CA_BUNDLE": CA_BUNDLES,
}

# Other variables that some variables need in order to be valid.
BESIDE = {
    "DB_SSLROOTCERT": {"DB_SSLMODE": "verify-full"},
    "DB_SSLCERT": {"DB_SSLKEY": __file__, "DB_SSLMODE": "require"},
    "DB_SSLKEY": {"DB_SSLCERT": __file__, "DB_SSLMODE": "require"},
    "DB_LISTEN_PORT": {"DB_LISTEN_HOST": "a,b"},
    "DB_READ_PORT": {"DB_READ_HOST": "a,b"},
    "DB_PORT": {"DB_HOST": "a,b"},
    "DB_MIGRATION_USERNAME": {"DB_MIGRATION_PASSWORD": "m1grat0r"},
    "DB_MIGRATION_PASSWORD": {"DB_MIGRATION_USERNAME": "migrator"},
}


def read(**environ: str) -> Settings:
    return Settings.from_env(REQUIRED | environ)


def problem(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ)
    return str(raised.value)


def test_without_variables_the_defaults_hold() -> None:
    settings = read()
    values = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    assert values == DEFAULTS | VALUES_OF_REQUIRED


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_variable_counts_as_unset(empty: str) -> None:
    assert read(**dict.fromkeys(OPTIONAL, empty)) == read()


def test_every_variable_is_in_the_table() -> None:
    assert VARIABLES.keys() == {field.name.upper() for field in fields(Settings)}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_parsed_by_its_kind(name: str) -> None:
    good, value, _, _ = VARIABLES[name]
    # The deadline must not be below any time-out in the table.
    settings = read(**{"NOTIFY_DEADLINE": "1h", name: good} | BESIDE.get(name, {}))
    assert getattr(settings, name.lower()) == value


@pytest.mark.parametrize("name", [name for name in VARIABLES if VARIABLES[name][2] is not ANY])
def test_the_error_names_the_variable_the_invalid_value_and_what_is_expected(name: str) -> None:
    _, _, wrong, kind = VARIABLES[name]
    message = problem(REQUIRED | {name: wrong or ""})
    expected = kind if isinstance(kind, str) else kind.expected
    assert message.startswith(f"{name} is {json.dumps(wrong)}: expected {expected}")
    assert PASSWORD not in message


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_a_variable_has_a_tested_kind_or_one_made_by_a_tested_function(field: Field) -> None:
    kind, (*_, expected) = field.metadata["kind"], VARIABLES[field.name.upper()]
    if isinstance(expected, str):
        assert kind.expected.startswith(expected)
        assert kind.parse.__qualname__.partition(".")[0] in {"whole_number", "one_of"}
    else:
        assert kind is expected


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("debug", "DEBUG"),
        ("info", "INFO"),
        ("warn", "WARNING"),
        ("warning", "WARNING"),
        ("error", "ERROR"),
        ("dpanic", "CRITICAL"),
        ("panic", "CRITICAL"),
        ("fatal", "CRITICAL"),
        ("critical", "CRITICAL"),
    ],
)
def test_a_log_level_may_have_pythons_name_or_the_go_services(text: str, level: str) -> None:
    assert read(LOG_LEVEL=text).log_level == level


def test_every_sslmode_of_libpq_is_accepted() -> None:
    modes = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
    assert [read(DB_SSLMODE=mode).db_sslmode for mode in modes] == modes


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("empty", [None, "", " "])
def test_a_missing_required_variable_is_named(name: str, empty: str | None) -> None:
    environ = {key: value for key, value in REQUIRED.items() if key != name}
    if empty is not None:
        environ[name] = empty
    expected = {
        "DB_HOST": kinds.HOSTS.expected,
        "DB_PORT": kinds.PORTS.expected,
        "DB_PASSWORD": "text, or DB_PASSWORD_FILE",
    }
    assert problem(environ) == f"{name} is missing: expected {expected.get(name, 'text')}"


def test_several_problems_are_reported_together() -> None:
    environ = {"DB_PASSWORD": PASSWORD, "DB_NAME": "n", "DB_PORT": "x", "WEB_THREADS": "0"}
    message = problem(environ)
    assert message.split("; ") == [
        'WEB_THREADS is "0": expected a whole number from 1 to 512',
        f"DB_HOST is missing: expected {kinds.HOSTS.expected}",
        f'DB_PORT is "x": expected {kinds.PORTS.expected}',
        "DB_USERNAME is missing: expected text",
    ]


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\rb", "a\x0bb", "a\x0cb", "a\x1eb", "a\x1b[2Jb"]
)
@pytest.mark.parametrize("name", ["LOG_LEVEL", "HTTP_CLIENT_TIMEOUT", "WEB_THREADS"])
def test_the_message_is_one_line_whatever_the_value_holds(name: str, text: str) -> None:
    message = problem(REQUIRED | {name: text})
    assert message.splitlines() == [message]
    assert "\x1b" not in message


def test_only_the_beginning_of_a_long_value_is_shown() -> None:
    message = problem(REQUIRED | {"LOG_LEVEL": "x" * 10_000})
    assert "x" * 100 in message
    assert "x" * 101 not in message


def test_a_path_too_long_for_the_system_is_a_wrong_value() -> None:
    message = problem(REQUIRED | {"REQUESTS_CA_BUNDLE": "/" + "x" * 10_000})
    assert message.startswith('REQUESTS_CA_BUNDLE is "/xxx')


def test_the_deadline_is_three_attempts_unless_it_is_set() -> None:
    assert read(HTTP_CLIENT_TIMEOUT="2s").notify_deadline == 6.0
    assert read(HTTP_CLIENT_TIMEOUT="2s", NOTIFY_DEADLINE="2s").notify_deadline == 2.0
    assert read(HTTP_CLIENT_TIMEOUT="50ms").notify_deadline == MIN_DEADLINE


@pytest.mark.parametrize(
    ("timeout", "deadline"),
    [("5s", "4999ms"), ("20s", "15s"), ("100ms", "249ms")],
)
def test_a_deadline_below_one_attempt_is_refused(timeout: str, deadline: str) -> None:
    environ = {"HTTP_CLIENT_TIMEOUT": timeout, "NOTIFY_DEADLINE": deadline}
    message = problem(REQUIRED | environ)
    assert message.startswith("NOTIFY_DEADLINE is ")
    assert "HTTP_CLIENT_TIMEOUT" in message
    assert "0.3s" in message
    assert message.splitlines() == [message]


def test_a_deadline_below_one_attempt_is_shown_in_seconds() -> None:
    message = problem(REQUIRED | {"NOTIFY_DEADLINE": "1s500ms"})
    assert message.startswith("NOTIFY_DEADLINE is 1.5s: expected at least one attempt")


def test_variables_of_the_go_service_without_effect_are_accepted() -> None:
    assert read(**dict.fromkeys(WITHOUT_EFFECT, "whatever")) == read()


def unknown(environ: dict[str, str]) -> dict[str, str]:
    return unknown_variables(environ, Settings.variables())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DB_SLMODE", "DB_SSLMODE"),
        ("DB_SSL_MODE", "DB_SSLMODE"),
        ("DB_PASS", "DB_PASSWORD"),
        ("DB_PASSWORD_FILES", "DB_PASSWORD_FILE"),
        ("DB_USERNAME_FILE", "DB_USERNAME"),
        ("HTTP_CLIENT_TIMOUT", "HTTP_CLIENT_TIMEOUT"),
        ("HTTP_SERVER_HOSTS", "HTTP_SERVER_HOST"),
        ("CIRCUIT_BREAKER_WINDOWS", "CIRCUIT_BREAKER_WINDOW"),
        ("CACHE_EXPIRE_TIME", "CACHE_EXPIRED_TIME"),
        ("NOTIFY_DEADLIN", "NOTIFY_DEADLINE"),
        ("WEB_CONCURENCY", "WEB_CONCURRENCY"),
        ("DRAIN_DELY", "DRAIN_DELAY"),
        # The prefix itself is misspelt.
        ("CIRCUT_BREAKER_WINDOW", "CIRCUIT_BREAKER_WINDOW"),
        ("NOTFY_DEADLINE", "NOTIFY_DEADLINE"),
        ("DBHOST", "DB_HOST"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("APPNAME", "APP_NAME"),
        ("db_sslmode", "DB_SSLMODE"),
    ],
)
def test_a_misspelt_variable_is_unknown_and_its_nearest_is_named(name: str, nearest: str) -> None:
    assert unknown(REQUIRED | {name: "anything"}) == {name: nearest}
    assert unknown(REQUIRED | {name: " "}) == {}


OTHERS_VARIABLES = [
    *("LOGNAME", "LOG_FORMAT", "LOG_FILE", "UV_LOG_LEVEL", "APP_ENV", "APP_HOME", "APP_VERSION"),
    *("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGSSLMODE", "PGSSLROOTCERT", "DATABASE_URL"),
    *("POSTGRES_PASSWORD", "MYSQL_HOST", "DJANGO_DB_HOST", "APP_DB_NAME", "XDG_CACHE_HOME"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "AWS_CA_BUNDLE", "PATH", "HOME", "HOSTNAME", "PORT", "LANG", "TZ", "PWD"),
    *("NOTIFY_SOCKET", "CACHE_DIRECTORY", "GUNICORN_CMD_ARGS", "PROMETHEUS_MULTIPROC_DIR"),
    *("DB_SERVICE_HOST", "DB_SERVICE_PORT", "DB_SERVICE_PORT_POSTGRES", "DB_PORT_5432_TCP"),
    *("DB_PORT_5432_TCP_ADDR", "WEB_SERVICE_HOST", "WEB_PORT", "WEB_PORT_80_TCP_PROTO"),
]


def test_variables_of_others_are_not_taken_for_misspelt_ones() -> None:
    assert unknown(dict.fromkeys(OTHERS_VARIABLES, "anything")) == {}


def test_no_variable_of_ours_is_unknown() -> None:
    ours = [*VARIABLES, *(f"{name}_FILE" for name in SECRETS), *WITHOUT_EFFECT]
    assert unknown(dict.fromkeys(ours, "anything")) == {}


def test_variables_are_read_in_capitals_only() -> None:
    assert read(web_threads="7", log_level="debug") == read()


def test_settings_are_frozen() -> None:
    settings = read()
    for field in fields(Settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, field.name, None)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_hidden_from_repr(name: str) -> None:
    settings = read(DB_MIGRATION_USERNAME="migrator", DB_MIGRATION_PASSWORD="other")
    settings = replace(settings, **{name.lower(): Secret(PASSWORD)})
    secret = getattr(settings, name.lower())
    assert secret.read() == PASSWORD
    assert "db.example.com" in repr(settings)
    assert name.lower() not in repr(settings)
    for shown in (repr(settings), repr(secret), str(secret), f"{secret}"):
        assert PASSWORD not in shown


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", REQUIRED | {"WEB_THREADS": "7"})
    assert settings_or_exit().web_threads == 7


def test_the_number_of_workers_follows_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert settings_module.available_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert settings_module.available_cpus() == 1


@pytest.mark.usefixtures("processes")
def test_a_wrong_environment_ends_the_process_with_one_line() -> None:
    environ = REQUIRED | {"LOG_LEVEL": "lo\nud", "WEB_THREADS": os.fsdecode(b"\xff")}
    start = "from notifier.settings import settings_or_exit; settings_or_exit()"
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=Path(__file__).parent.parent,
        env=environ,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith('notifier cannot start: LOG_LEVEL is "lo\\nud": expected one of ')
    assert "; WEB_THREADS is " in line
    assert PASSWORD not in line


# --- secrets in files


def read_secret_file(name: str, file: Path) -> Settings:
    """Read the settings where secret `name` is in `file` and the other is in its variable."""
    environ = {"DB_MIGRATION_USERNAME": "migrator", "DB_MIGRATION_PASSWORD": "other"}
    return read(**environ | {name: "", f"{name}_FILE": str(file)})


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (PASSWORD, PASSWORD),
        (PASSWORD + "\n", PASSWORD),
        (PASSWORD + "\r\n", PASSWORD),
        ("\n two\rwords \u00fc\t\n\n", "\n two\rwords \u00fc\t"),
    ],
)
def test_a_secret_is_read_from_its_file_without_the_line_end(
    name: str, content: str, secret: str, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content.encode())
    assert getattr(read_secret_file(name, file), name.lower()).read() == secret


@pytest.mark.parametrize("name", SECRETS)
def test_a_secrets_file_is_read_again_each_time(name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("the first")
    secret = getattr(read_secret_file(name, file), name.lower())
    for text in ("the second", "the third"):
        file.write_text(text)
        assert secret.read() == text
    file.unlink()
    with pytest.raises(FileNotFoundError):
        secret.read()
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"\A\Z"):
        secret.read()


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "empty, or not UTF-8 text"),
        (b" \r\n", "empty, or not UTF-8 text"),
        (PASSWORD.encode() + b"\xff", "empty, or not UTF-8 text"),
        (PASSWORD.encode("utf-16"), "empty, or not UTF-8 text"),
        (PASSWORD.encode("utf-16-le"), "empty, or not UTF-8 text"),  # every other byte is a NUL
    ],
)
def test_an_unusable_secret_file_is_reported_without_the_secret(
    name: str, content: bytes | None, why: str, tmp_path: Path
) -> None:
    file = tmp_path / PASSWORD  # a secret put into the variable of the file is not shown either
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError) as raised:
        read_secret_file(name, file)
    expected = "expected a readable file with the secret"
    assert str(raised.value) == f"{name}_FILE cannot be used ({why}): {expected}"


@pytest.mark.parametrize("file", ["/", "/" + "x" * 10_000, f"{__file__}/below-a-file"])
def test_a_secret_file_that_is_not_a_file_is_reported(file: str) -> None:
    with pytest.raises(
        SettingsError, match=r"\ADB_PASSWORD_FILE cannot be used \([A-Z][a-z ]+\): "
    ):
        read_secret_file("DB_PASSWORD", Path(file))


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_and_its_file_together_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(PASSWORD)
    both = {"DB_MIGRATION_USERNAME": "migrator", name: PASSWORD, f"{name}_FILE": str(file)}
    message = problem(REQUIRED | both)
    assert message == f"{name} and {name}_FILE are both set: expected one of them"


@pytest.mark.parametrize("name", SECRETS)
def test_an_empty_variable_of_a_secrets_file_counts_as_unset(name: str) -> None:
    migrator = {"DB_MIGRATION_USERNAME": "migrator", "DB_MIGRATION_PASSWORD": PASSWORD}
    settings = read(**migrator | {f"{name}_FILE": " "})
    assert getattr(settings, name.lower()) == Secret(PASSWORD)


# --- variables that belong together


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("DB_MIGRATION_USERNAME", "DB_MIGRATION_PASSWORD, or DB_MIGRATION_PASSWORD_FILE,"),
        ("DB_MIGRATION_PASSWORD", "DB_MIGRATION_USERNAME"),
        ("DB_MIGRATION_PASSWORD_FILE", "DB_MIGRATION_USERNAME"),
        ("DB_SSLCERT", "DB_SSLKEY"),
        ("DB_SSLKEY", "DB_SSLCERT"),
    ],
)
def test_half_a_pair_is_refused(given: str, missing: str) -> None:
    message = problem(REQUIRED | {given: __file__})
    assert message == f"{missing} is missing: {given} needs it"


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"DB_PORT": "1,2"}, 'DB_PORT is "1,2"'),
        ({"DB_HOST": "a,b,c", "DB_PORT": "1,2"}, 'DB_PORT is "1,2"'),
        ({"DB_LISTEN_PORT": "1,2"}, 'DB_LISTEN_PORT is "1,2"'),
        ({"DB_READ_HOST": "c", "DB_READ_PORT": "1,2"}, 'DB_READ_PORT is "1,2"'),
        (
            {"DB_HOST": "a,b", "DB_PORT": "1,2", "DB_READ_HOST": "c"},
            'DB_READ_PORT is DB_PORT\'s "1,2"',
        ),
    ],
)
def test_several_ports_must_match_the_number_of_hosts(given: dict[str, str], wrong: str) -> None:
    message = problem(REQUIRED | given)
    assert message.startswith(f"{wrong}: expected one port, or one for each host of ")


def test_by_default_one_place_and_one_role_are_used_for_everything() -> None:
    settings = read()
    place = ("db.example.com", "5432")
    assert [settings.serve_place, settings.listen_place, settings.read_place] == [place] * 3
    assert settings.migrating_role == ("notifier", Secret(PASSWORD))


def test_each_place_and_the_migrating_role_can_be_set_separately() -> None:
    settings = read(
        DB_HOST="a,b",
        DB_PORT="6432",
        DB_LISTEN_PORT="5432",
        DB_READ_HOST="c",
        DB_MIGRATION_USERNAME="migrator",
        DB_MIGRATION_PASSWORD="other",
    )
    assert settings.serve_place == ("a,b", "6432")
    assert settings.listen_place == ("a,b", "5432")
    assert settings.read_place == ("c", "6432")
    assert settings.migrating_role == ("migrator", Secret("other"))


@pytest.mark.parametrize("name", ["DB_SSLROOTCERT", "DB_SSLCERT"])
def test_files_for_tls_without_tls_are_refused(name: str) -> None:
    """An operator who sets them expects an encrypted connection."""
    files = {"DB_SSLROOTCERT": certifi.where(), "DB_SSLCERT": __file__, "DB_SSLKEY": __file__}
    given = {name: files[name]} | ({"DB_SSLKEY": __file__} if name == "DB_SSLCERT" else {})
    assert problem(REQUIRED | given) == (
        f"{name} is set, but DB_SSLMODE is disable: expected verify-full"
    )
    Settings.from_env(REQUIRED | given | {"DB_SSLMODE": "verify-full"})


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_the_environment_that_is_not_text_is_refused_and_not_shown(name: str) -> None:
    message = problem(REQUIRED | {"DB_MIGRATION_USERNAME": "m", name: os.fsdecode(b"p4ss\xff")})
    assert message.startswith(f"{name} is not UTF-8 text: ")
    assert "p4ss" not in message
