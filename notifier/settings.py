"""The settings: read from the environment once, validated as a whole, frozen."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from notifier.environ import (
    ADDRESS,
    CA_BUNDLE,
    COUNT,
    DELAY,
    DURATION,
    FILE,
    HOSTS,
    LISTEN_PORT,
    PORTS,
    ROOT_CERT,
    SWITCH,
    TEXT,
    Kind,
    Secret,
    one_of,
    secret_text,
    whole_number,
)
from notifier.variables import proxy_problems

# Seconds. With less time left no attempt begins.
MIN_ATTEMPT = 0.25

# Minimum deadline in seconds: one attempt and its overhead.
MIN_DEADLINE = 0.3

# Threads of a worker that refuse requests and answer operators.
SPARE_THREADS = 4

# Maximum size of a request's body.
MAX_BODY_BYTES = 256 * 1024

# Python's names, and those of zap, the Go service's logger.
_LOG_LEVELS = {
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
    "dpanic": "CRITICAL",
    "panic": "CRITICAL",
    "fatal": "CRITICAL",
    "critical": "CRITICAL",
}
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


class SettingsError(Exception):
    """The environment cannot be used; the message is one line that names every wrong variable."""


def _variable(kind: Kind, default: Any = ..., *, secret: bool = False) -> Any:
    """Declare a field that is read from the variable with its name in capitals."""
    given = {} if default is ... else {"default": default}
    return field(metadata={"kind": kind, "secret": secret}, repr=not secret, **given)


def available_cpus() -> int:
    """Return the CPUs this process may run on, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every field is the environment variable of the same name; durations are in seconds."""

    app_name: str = _variable(TEXT, "notification-service")
    log_level: str = _variable(one_of(_LOG_LEVELS), "INFO")

    http_server_host: str | None = _variable(ADDRESS, None)
    http_server_port: int = _variable(LISTEN_PORT, 8080)
    http_server_keepalive: float = _variable(DELAY, 75.0)
    web_concurrency: int = _variable(whole_number(1, 256), min(4, available_cpus()))
    web_threads: int = _variable(whole_number(1, 512), 32)
    web_instances: int = _variable(whole_number(1, 10_000), 5)  # for `migrate`

    drain_delay: float = _variable(DELAY, 0.0)

    http_client_timeout: float = _variable(DURATION, 5.0)
    notify_deadline: float = _variable(DURATION, 0.0)  # 0: three attempts, see __post_init__

    circuit_breaker_max_half_open_requests: int = _variable(COUNT, 5)
    circuit_breaker_open_state_timeout: float = _variable(DURATION, 60.0)
    circuit_breaker_min_requests_before_trip: int = _variable(COUNT, 3)
    circuit_breaker_failure_threshold_percent: int = _variable(whole_number(1, 100), 60)
    circuit_breaker_window: float = _variable(DURATION, 60.0)

    cache_expired_time: float = _variable(DURATION, 600.0)

    cache_invalidation: str = _variable(SWITCH, "on")

    allow_local_addresses: str = _variable(SWITCH, "off")

    db_host: str = _variable(HOSTS)
    db_port: str = _variable(PORTS)
    db_name: str = _variable(TEXT)
    db_username: str = _variable(TEXT)
    db_password: Secret = _variable(TEXT, secret=True)
    db_sslmode: str = _variable(one_of({mode: mode for mode in _SSL_MODES}), "disable")
    db_sslrootcert: str | None = _variable(ROOT_CERT, None)
    db_sslcert: str | None = _variable(FILE, None)
    db_sslkey: str | None = _variable(FILE, None)

    # The properties below have the defaults of these.
    db_listen_host: str | None = _variable(HOSTS, None)
    db_listen_port: str | None = _variable(PORTS, None)
    db_read_host: str | None = _variable(HOSTS, None)
    db_read_port: str | None = _variable(PORTS, None)
    db_migration_username: str | None = _variable(TEXT, None)
    db_migration_password: Secret | None = _variable(TEXT, None, secret=True)

    requests_ca_bundle: str | None = _variable(CA_BUNDLE, None)
    curl_ca_bundle: str | None = _variable(CA_BUNDLE, None)

    def __post_init__(self) -> None:
        if not self.notify_deadline:
            deadline = max(3 * self.http_client_timeout, MIN_DEADLINE)
            object.__setattr__(self, "notify_deadline", deadline)
        if self.notify_deadline < max(self.http_client_timeout, MIN_DEADLINE):
            raise SettingsError(
                f"NOTIFY_DEADLINE is {self.notify_deadline:g}s: expected at least one attempt "
                f"(HTTP_CLIENT_TIMEOUT, {self.http_client_timeout:g}s) and at least {MIN_DEADLINE}s"
            )
        self._check_pairs()
        self._check_ports()
        self._check_tls()

    def _check_pairs(self) -> None:
        for first, second in (
            ("db_migration_username", "db_migration_password"),
            ("db_sslcert", "db_sslkey"),
        ):
            given = {name for name in (first, second) if getattr(self, name) is not None}
            if len(given) == 1:
                (name,), (other,) = given, {first, second} - given
                value = getattr(self, name)
                from_file = "_FILE" if isinstance(value, Secret) and value.file else ""
                instead = f", or {other.upper()}_FILE," if "password" in other else ""
                missing = f"{other.upper()}{instead} is missing"
                raise SettingsError(f"{missing}: {name.upper()}{from_file} needs it")

    def _check_tls(self) -> None:
        for name in ("db_sslrootcert", "db_sslcert"):
            if self.db_sslmode == "disable" and getattr(self, name) is not None:
                raise SettingsError(
                    f"{name.upper()} is set, but DB_SSLMODE is disable: expected verify-full"
                )

    def _check_ports(self) -> None:
        places = {
            "db_port": self.serve_place,
            "db_listen_port": self.listen_place,
            "db_read_port": self.read_place,
        }
        for name, (hosts, ports) in places.items():
            if len(ports.split(",")) not in (1, len(hosts.split(","))):
                whose = "" if getattr(self, name) else "DB_PORT's "
                raise SettingsError(
                    f"{name.upper()} is {whose}{json.dumps(ports)}: "
                    f"expected one port, or one for each host of {json.dumps(hosts)}"
                )

    @property
    def server_threads(self) -> int:
        """Threads of a worker: for notifications in progress, for as many waiting, and to spare.

        The spare threads answer operators and refuse requests, even if all others are busy.
        """
        return 2 * self.web_threads + SPARE_THREADS

    @property
    def serve_place(self) -> tuple[str, str]:
        """Hosts and ports of PostgreSQL."""
        return self.db_host, self.db_port

    @property
    def listen_place(self) -> tuple[str, str]:
        """Hosts and ports for LISTEN."""
        return self.db_listen_host or self.db_host, self.db_listen_port or self.db_port

    @property
    def read_place(self) -> tuple[str, str]:
        """Hosts and ports for reads that tolerate replication lag."""
        return self.db_read_host or self.db_host, self.db_read_port or self.db_port

    @property
    def migrating_role(self) -> tuple[str, Secret]:
        """Name and password of the role that owns the schema."""
        if self.db_migration_username and self.db_migration_password:
            return self.db_migration_username, self.db_migration_password
        return self.db_username, self.db_password

    @classmethod
    def variables(cls) -> list[str]:
        """Return the names of the variables that `from_env` reads."""
        names = [spec.name.upper() for spec in fields(cls)]
        return names + [f"{s.name.upper()}_FILE" for s in fields(cls) if s.metadata["secret"]]

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the variables; an empty one counts as unset.

        Raises:
            SettingsError: one line that names every variable that is missing or wrong.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for spec in fields(cls):
            try:
                _read(spec, environ, values)
            except SettingsError as error:
                problems.append(str(error))
        problems += proxy_problems(environ)
        if problems:
            raise SettingsError("; ".join(problems))
        return cls(**values)


def _read(spec: Field[Any], environ: Mapping[str, str], values: dict[str, Any]) -> None:
    """Put the variable's value into `values`, if it has one."""
    name, kind, secret = spec.name.upper(), spec.metadata["kind"], spec.metadata["secret"]
    text = environ.get(name, "")
    if secret and environ.get(f"{name}_FILE", "").strip():
        values[spec.name] = _secret_file(name, text, environ[f"{name}_FILE"].strip())
        return
    if not text.strip():
        if spec.default is MISSING:
            instead = f", or {name}_FILE" if secret else ""
            raise SettingsError(f"{name} is missing: expected {kind.expected}{instead}")
        return
    try:
        values[spec.name] = Secret(secret_text(text)) if secret else kind.parse(text.strip())
    except ValueError:
        shown = "not UTF-8 text" if secret else json.dumps(text[:100])
        raise SettingsError(f"{name} is {shown}: expected {kind.expected}") from None


def _secret_file(name: str, text: str, file: str) -> Secret:
    if text.strip():
        raise SettingsError(f"{name} and {name}_FILE are both set: expected one of them")
    secret = Secret(file=file)
    try:
        secret.read()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "empty, or not UTF-8 text"
        # Don't show the value: it may be the secret itself, in the wrong variable.
        raise SettingsError(
            f"{name}_FILE cannot be used ({why}): expected a readable file with the secret"
        ) from None
    return secret


def settings_or_exit() -> Settings:
    """Read the process's environment; if it is unusable, end the process with one line."""
    try:
        return Settings.from_env(os.environ)
    except SettingsError as error:
        sys.exit(f"notifier cannot start: {error}")
