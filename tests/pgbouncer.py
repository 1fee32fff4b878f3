"""A real pgbouncer in front of a test's server, by default in transaction pooling mode."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg

from notifier.settings import Settings
from notifier.store.db import Database
from tests.service import free_port
from tests.timing import eventually
from tools import HOST
from tools.dev import programs

# Debian installs servers in /usr/sbin, which is on root's PATH only.
PATH = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"


def executable() -> str | None:
    """Return the path of pgbouncer, or None if it is not installed."""
    return shutil.which("pgbouncer", path=PATH)


class PgBouncer:
    """A pgbouncer on 127.0.0.1 in front of the server whose `DB_*` variables are `server`.

    `environment` holds the `DB_*` variables that connect through it. It has its own folder, removed
    at the end.
    """

    def __init__(self, server: dict[str, str], pool_mode: str = "transaction") -> None:
        self.environment = server | {"DB_HOST": HOST, "DB_PORT": str(free_port())}
        self._folder = Path(tempfile.mkdtemp(prefix="notifier-pgbouncer-"))
        programs.give_to_account(self._folder)
        self._log = self._folder / "pgbouncer.log"
        self._process: subprocess.Popen[bytes] | None = None
        settings = Settings.from_env(server)
        roles = {(settings.db_username, settings.db_password), settings.migrating_role}
        users = "".join(f'"{name}" "{password.read()}"\n' for name, password in roles)
        ini = f"""
            [databases]
            * = host={server["DB_HOST"]} port={server["DB_PORT"]}
            [pgbouncer]
            listen_addr = {HOST}
            listen_port = {self.environment["DB_PORT"]}
            unix_socket_dir =
            auth_type = scram-sha-256
            auth_file = users.txt
            pool_mode = {pool_mode}
        """
        for name, text in (("users.txt", users), ("pgbouncer.ini", ini)):
            file = self._folder / name
            file.touch(0o600)
            file.write_text(text)
            programs.give_to_account(file)

    def __enter__(self) -> "PgBouncer":
        """Start pgbouncer and return once a query through it succeeds."""
        binary = executable()
        assert binary is not None, "the system has no pgbouncer"
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [binary, "pgbouncer.ini"],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    **programs.as_account(self._folder),
                )
            eventually(self._answers)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # at SIGTERM newer versions wait until all clients have left
            self._process.wait(20)
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            with Database(Settings.from_env(self.environment)).connect() as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True
