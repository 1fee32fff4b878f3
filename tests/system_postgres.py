"""Servers of the system's PostgreSQL, for features that the embedded one lacks: TLS, standbys."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from tests.service import free_port
from tests.timing import eventually
from tools import HOST
from tools.dev import cluster, programs

ADMIN = "postgres"
START_SECONDS = 30


def binaries() -> Path | None:
    """Return the folder of the system's newest PostgreSQL; Debian does not put it on PATH."""
    found = [path for pattern in programs.SYSTEM for path in Path("/").glob(pattern)]
    servers = [path for path in found if (path / "postgres").exists()]
    return max(servers, key=_major_version, default=None)


def _major_version(binaries: Path) -> int:
    return int(re.findall(r"\d+", str(binaries))[-1])


@dataclass(frozen=True)
class Tls:
    """A server's TLS files. A server that has them refuses connections without TLS.

    Args:
        certificate: the server's own, with its key beside it, as `make_certificate` writes them.
        clients: the authority for client certificates. If it is given, each client must present a
            certificate in its user's name.
    """

    certificate: Path
    clients: Path | None = None


class SystemPostgres:
    """A server on 127.0.0.1 with its own folder, which is removed at the end.

        with SystemPostgres() as primary, primary.standby() as standby: ...

    `environment` holds the `DB_*` variables for the role `notifier` and its empty database. The
    host name `localhost` works too. A standby has its primary's variables with another port.
    """

    def __init__(self, tls: Tls | None = None, primary: "SystemPostgres | None" = None) -> None:
        self._tls = tls
        self._primary = primary
        self._password: str = primary._password if primary else secrets.token_urlsafe(12)
        self._admins: str = primary._admins if primary else secrets.token_urlsafe(12)
        self._port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="notifier-system-"))
        programs.give_to_account(self._folder)
        self._data = self._folder / "data"
        self._log = self._folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "DB_HOST": HOST,
            "DB_PORT": str(self._port),
            "DB_NAME": cluster.NAME,
            "DB_USERNAME": cluster.NAME,
            "DB_PASSWORD": self._password,
            "DB_SSLMODE": "require" if self._tls else "disable",
        }

    def __enter__(self) -> "SystemPostgres":
        """Start the server and return once it accepts connections."""
        try:
            if self._primary:
                self._copy(self._primary)
                self._start()
            else:
                self._initialise()
                self._start()
                self._provide_database()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def standby(self) -> "SystemPostgres":
        """Return a hot standby of this server, not started yet."""
        return SystemPostgres(self._tls, primary=self)

    def execute(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a query as superuser in the database of `environment` and return its rows."""
        with self._connect(cluster.NAME) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def stop(self) -> None:
        """Shut the server down: fast, then immediate, then by SIGKILL, 20 seconds apart."""
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            if self._process is None or self._process.poll() is not None:
                return
            self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)

    def _initialise(self) -> None:
        password = self._folder / "password"
        password.write_text(self._admins)
        programs.give_to_account(password)
        options = [f"--username={ADMIN}", f"--pwfile={password}", "--encoding=UTF8", "--locale=C"]
        self._run("initdb", *options)
        rules = [f"local {database} all scram-sha-256" for database in ("all", "replication")]
        (self._data / "pg_hba.conf").write_text("\n".join([*rules, self._admit()]) + "\n")
        if self._tls:
            self._install("server.crt", self._tls.certificate)
            self._install("server.key", self._tls.certificate.with_name("key.pem"))
            if self._tls.clients:
                self._install("clients.crt", self._tls.clients)

    def _admit(self) -> str:
        """Return the line of pg_hba.conf for TCP connections."""
        if not self._tls:
            return "host all all 127.0.0.1/32 scram-sha-256"
        demanded = " clientcert=verify-full" if self._tls.clients else ""
        return f"hostssl all all 127.0.0.1/32 scram-sha-256{demanded}"

    def _install(self, name: str, source: Path) -> None:
        target = self._data / name
        target.touch(0o600)
        target.write_bytes(source.read_bytes())
        programs.give_to_account(target)

    def _copy(self, source: "SystemPostgres") -> None:
        where = f"host={source._folder} port={source._port} user={ADMIN} password={self._admins}"
        self._run(
            "pg_basebackup", f"--dbname={where}", "--write-recovery-conf", "--checkpoint=fast"
        )

    def _run(self, program: str, *arguments: str) -> None:
        """Run a PostgreSQL program that creates the data directory."""
        done = subprocess.run(
            [self._binary(program), f"--pgdata={self._data}", "--no-sync", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            check=False,
            **programs.as_account(self._folder),
        )
        assert done.returncode == 0, os.fsdecode(done.stdout)

    def _start(self) -> None:
        """Start the server and return once it accepts connections."""
        settings = {
            "port": self._port,
            "listen_addresses": HOST,
            "unix_socket_directories": self._folder,
            "fsync": "off",
            "ssl": "on" if self._tls else "off",
            "ssl_ca_file": "clients.crt" if self._tls and self._tls.clients else "",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary("postgres"), "-D", self._data, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                **programs.as_account(self._folder),
            )
        eventually(self._answers, START_SECONDS)

    def _binary(self, name: str) -> Path:
        folder = binaries()
        assert folder is not None, "the system has no PostgreSQL"
        return folder / name

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            self._connect(ADMIN).close()
        except psycopg.OperationalError:
            return False
        return True

    def _provide_database(self) -> None:
        names = {"name": sql.Identifier(cluster.NAME), "password": sql.Literal(self._password)}
        with self._connect(ADMIN) as connection:
            role = sql.SQL("CREATE ROLE {name} LOGIN PASSWORD {password}")
            connection.execute(role.format(**names))
            connection.execute(sql.SQL("CREATE DATABASE {name} OWNER {name}").format(**names))

    def _connect(self, database: str) -> psycopg.Connection[Any]:
        """Connect as superuser through the Unix socket in the folder, which needs no TLS."""
        return psycopg.connect(
            host=str(self._folder),
            port=self._port,
            user=ADMIN,
            password=self._admins,
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )
