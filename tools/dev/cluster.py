"""One PostgreSQL server and its directory: first start, start and stop.

Nothing here decides when a server is needed, nor keeps two callers apart: `postgres.py` does, and
calls `start` and `stop` under its lock. All of it may have been killed at any point before.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

from tools import HOST
from tools.dev import programs
from tools.dev.programs import ELSEWHERE, PostgresError

NAME = "notifier"  # of the database and of the role that owns it
SERVING = "notifier_service"  # the role that the service has; a migration makes it
PARTIAL = "partial-"  # a data directory has this name until it is complete
READY_SECONDS = 60.0
NOBODYS_PID = "2147483646"
BUILTIN_LOCALES_SINCE = 17


@contextlib.contextmanager
def explained(base: Path) -> Iterator[None]:
    """Turn what the system and psycopg raise into a PostgresError."""
    try:
        yield
    except OSError as error:
        where = error.filename or base
        raise PostgresError(
            f"{where}: {error.strerror or error}: correct that, {ELSEWHERE}"
        ) from error
    except psycopg.Error as error:
        problem = f"the server in {base} fails: {_one_line(str(error))}"
        raise PostgresError(f"{problem}; see {base / 'server.log'}") from error


def environment(base: Path) -> dict[str, str]:
    """The DB_* variables of the server in `base`."""
    where = {"DB_HOST": HOST, "DB_PORT": (base / "port").read_text(), "DB_NAME": NAME}
    serving = {"DB_USERNAME": SERVING, "DB_PASSWORD": (base / "service-password").read_text()}
    owner = {
        "DB_MIGRATION_USERNAME": NAME,
        "DB_MIGRATION_PASSWORD": (base / "password").read_text(),
    }
    return {**where, **serving, **owner, "DB_SSLMODE": "disable"}


def start(base: Path, *, unsafe: bool) -> None:
    """Start the server in `base` if it does not run, and make sure of the project's database.

    An unsafe server is fast and loses its data in a power cut. Raises PostgresError.
    """
    with explained(base):
        password = _password(base)
        port = _port_when_ready(base, password) or _start_stopped(base, password, unsafe)
        _provide_database(port, password)
        (base / "port").write_text(str(port))


def stop(base: Path) -> None:
    """Shut the server down, less and less politely if it takes long; return when it is gone."""
    for number, seconds in ((signal.SIGINT, 60), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)):
        running = _running(base / "data")
        if running is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(running[0], number)
        deadline = time.monotonic() + seconds
        while _serves(running[0], base / "data") and time.monotonic() < deadline:
            time.sleep(0.02)


def _start_stopped(base: Path, password: str, unsafe: bool) -> int:
    """Start a server where none runs; return its port."""
    data, log = base / "data", base / "server.log"
    for leftover in base.glob(PARTIAL + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    binaries, version = programs.find(base)
    if not data.exists():
        _initialise(base, binaries, version)
    made_by = (data / "PG_VERSION").read_text().strip()
    if made_by != str(version):
        raise PostgresError(
            f"{data} was made by PostgreSQL {made_by}, but PostgreSQL {version} is installed: "
            f"install {made_by}, remove {base} with all that is stored there, {ELSEWHERE}"
        )
    _replace_stale_pid(data / "postmaster.pid")
    log.unlink(missing_ok=True)
    for pause in (0.0, 0.2, 1.0):
        time.sleep(pause)  # the port was taken meanwhile, or backends of a killed server still end
        if port := _launch(base, binaries, password, unsafe):
            return port
    problem = _one_line(log.read_text(errors="replace"))
    raise PostgresError(
        f"PostgreSQL did not start: {problem}; correct that (see {log}), {ELSEWHERE}"
    )


def _launch(base: Path, binaries: Path, password: str, unsafe: bool) -> int | None:
    """Start the server process once; return its port, or None if it ended."""
    port = _free_port(base / "port")
    settings = [f"port={port}", f"listen_addresses={HOST}", "unix_socket_directories="]
    if unsafe:
        settings += ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
    command = [str(binaries / "postgres"), "-D", str(base / "data")]
    command += [part for setting in settings for part in ("-c", setting)]
    with (base / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **programs.as_account(base))
    return _port_when_ready(base, password, process)


def _port_when_ready(
    base: Path, password: str, process: subprocess.Popen[bytes] | None = None
) -> int | None:
    """Wait until the directory's server, or the one that `process` becomes, takes connections.

    Returns its port, or None if there is no such server. One that is there but does not answer in
    READY_SECONDS raises PostgresError, for a second one on its data would destroy them.
    """
    deadline = time.monotonic() + READY_SECONDS
    problem = "it is silent"
    while time.monotonic() < deadline:
        if running := _running(base / "data"):
            try:
                _connect(running[1], password).close()
                return running[1]
            except psycopg.OperationalError as error:
                problem = _one_line(str(error))
        elif process is None or process.poll() is not None:
            return None
        time.sleep(0.02)
    raise PostgresError(f"cannot use the server in {base}: {problem}; see {base / 'server.log'}")


def _running(data: Path) -> tuple[int, int] | None:
    """The process id and port of the directory's server; a postmaster.pid alone proves nothing."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid, port = int(lines[0]), int(lines[3])
    except (OSError, IndexError, ValueError):
        return None
    return (pid, port) if _serves(pid, data) else None


def _serves(pid: int, data: Path) -> bool:
    """Whether the process is the directory's server: its id may be a zombie's, or used again."""
    if Path("/proc/self/cmdline").exists():
        try:
            command = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
        except OSError:
            return False
    else:
        ps = ["ps", "-ww", "-p", str(pid), "-o", "command="]
        command = os.fsdecode(subprocess.run(ps, check=False, capture_output=True).stdout)
    return f" -D {data} " in command


def _replace_stale_pid(file: Path) -> None:
    """Keep PostgreSQL from taking a zombie, or whoever has the id now, for a running server.

    Only the id is replaced, by one that cannot exist: the file's shared memory key has to stay, for
    by it PostgreSQL notices backends that outlived their server. An empty file, from a crash before
    it was filled, has no key, and PostgreSQL would refuse to start.
    """
    if not file.exists():
        return
    if lines := file.read_text().splitlines():
        file.write_text("\n".join([NOBODYS_PID, *lines[1:]]) + "\n")
    else:
        file.unlink()


def _free_port(saved: Path) -> int:
    """The last port if it is free, so that saved addresses keep working, else any."""
    for wanted in (saved.read_text() if saved.exists() else "0", "0"):
        with socket.socket() as probe, contextlib.suppress(OSError, ValueError, OverflowError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, int(wanted)))
            return int(probe.getsockname()[1])
    raise PostgresError(f"no port of {HOST} is free: end some programs")


def _password(base: Path) -> str:
    """The one password of the superuser and of the project's role, made before anything else.

    The password of the role that serves can be made at any time: each migration sets it.
    """
    file = base / "password"
    if not file.exists() and (base / "data").exists():
        raise PostgresError(f"{file} is gone: restore it, or remove {base} with its data")
    _kept_secret(base / "service-password")
    return _kept_secret(file)


def _kept_secret(file: Path) -> str:
    """What the file holds; one that is not there is made, and has its name once it is complete."""
    if not file.exists():
        new = file.with_name(f"{file.name}.new")
        new.touch(0o600)
        new.write_text(secrets.token_urlsafe(24))
        programs.give_to_account(new)
        new.replace(file)
    return file.read_text()


def _initialise(base: Path, binaries: Path, version: int) -> None:
    """Make the data directory; it gets its name when complete, so that a half one is never used."""
    fresh = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=base))
    programs.give_to_account(fresh)
    command = [str(binaries / "initdb"), "-D", str(fresh), "-U", "postgres", "-A", "scram-sha-256"]
    command += [f"--pwfile={base / 'password'}", "--encoding=UTF8", "--locale=C"]
    command += ["--no-sync"]  # many seconds on some disks, for data that nobody has put in yet
    if version >= BUILTIN_LOCALES_SINCE:
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    done = subprocess.run(command, check=False, capture_output=True, **programs.as_account(base))
    if done.returncode:
        problem = _one_line(os.fsdecode(done.stderr))
        raise PostgresError(f"initdb failed: {problem}; correct that, {ELSEWHERE}")
    fresh.rename(base / "data")


def _connect(port: int, password: str) -> psycopg.Connection:
    server = f"host={HOST} port={port} sslmode=disable gssencmode=disable connect_timeout=5"
    superuser = "user=postgres dbname=postgres"
    return psycopg.connect(f"{server} {superuser}", password=password, autocommit=True)


def _provide_database(port: int, password: str) -> None:
    """Make the project's role and database, unless they are there already."""
    names = {"name": sql.Identifier(NAME), "password": sql.Literal(password)}
    role = sql.SQL("CREATE ROLE {name} LOGIN CREATEDB CREATEROLE PASSWORD {password}")
    database = sql.SQL("CREATE DATABASE {name} OWNER {name}")
    with _connect(port, password) as connection:
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [NAME]).rowcount:
            connection.execute(role.format(**names))
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount:
            connection.execute(database.format(**names))


def _one_line(text: str) -> str:
    """The end of a text of several lines."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
