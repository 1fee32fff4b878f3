"""One PostgreSQL server and its directory: first start, start and stop.

`postgres.py` decides when a server is needed, and calls `start` and `stop` under its lock. Any
earlier run may have been killed at any point.
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
SERVING = "notifier_service"  # the service's role; a migration creates it
PARTIAL = "partial-"  # a data directory has this name until it is complete
READY_SECONDS = 60.0
NOBODYS_PID = "2147483646"
BUILTIN_LOCALES_SINCE = 17

_WITHOUT_LARGE_OBJECTS = """
    DO $$ BEGIN
        EXECUTE (SELECT 'REVOKE EXECUTE ON FUNCTION '
                        || string_agg(oid::regprocedure::text, ', ') || ' FROM PUBLIC'
                   FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace
                    AND (proname LIKE 'lo\\_%' OR proname IN ('loread', 'lowrite')));
    END $$
"""


@contextlib.contextmanager
def explained(base: Path) -> Iterator[None]:
    """Turn errors of the system and of psycopg into a PostgresError."""
    try:
        yield
    except OSError as error:
        where = error.filename or base
        raise PostgresError(f"{where}: {error.strerror or error}: fix that, {ELSEWHERE}") from error
    except psycopg.Error as error:
        problem = f"the server in {base} fails: {_one_line(str(error))}"
        raise PostgresError(f"{problem}; see {base / 'server.log'}") from error


def environment(base: Path) -> dict[str, str]:
    """Return the DB_* variables of the server in `base`."""
    where = {"DB_HOST": HOST, "DB_PORT": (base / "port").read_text(), "DB_NAME": NAME}
    serving = {"DB_USERNAME": SERVING, "DB_PASSWORD": (base / "service-password").read_text()}
    owner = {
        "DB_MIGRATION_USERNAME": NAME,
        "DB_MIGRATION_PASSWORD": (base / "password").read_text(),
    }
    return {**where, **serving, **owner, "DB_SSLMODE": "disable"}


def start(base: Path, *, unsafe: bool) -> None:
    """Start the server in `base` if it does not run, and create the project's database if missing.

    An unsafe server is fast, but loses its data in a power cut. Raises PostgresError.
    """
    with explained(base):
        password = _password(base)
        port = _port_when_ready(base, password) or _start_stopped(base, password, unsafe)
        _provide_database(port, password)
        (base / "port").write_text(str(port))


def stop(base: Path) -> None:
    """Shut the server down, with stronger signals if it takes long; return when it has ended."""
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
            f"install {made_by}, remove {base} with all its data, {ELSEWHERE}"
        )
    _replace_stale_pid(data / "postmaster.pid")
    log.unlink(missing_ok=True)
    for pause in (0.0, 0.2, 1.0):
        # A start fails if the port was just taken, or while backends of a killed server still run.
        time.sleep(pause)
        if port := _launch(base, binaries, password, unsafe):
            return port
    problem = _one_line(log.read_text(errors="replace"))
    raise PostgresError(f"PostgreSQL did not start: {problem}; fix that (see {log}), {ELSEWHERE}")


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
    """Wait until the directory's server, or the one that `process` becomes, accepts connections.

    Returns its port, or None if there is no such server. A server that does not answer within
    READY_SECONDS raises PostgresError, because a second server would destroy its data.
    """
    deadline = time.monotonic() + READY_SECONDS
    problem = "it does not answer"
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
    """Return the process id and port of the directory's server; postmaster.pid may be stale."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid, port = int(lines[0]), int(lines[3])
    except (OSError, IndexError, ValueError):
        return None
    return (pid, port) if _serves(pid, data) else None


def _serves(pid: int, data: Path) -> bool:
    """Return whether the process is the directory's server, not a zombie or one that got its id."""
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
    """Keep PostgreSQL from taking a zombie, or another process with the id, for a running server.

    Only the id is replaced, by one that cannot exist. The file's shared memory key has to stay:
    PostgreSQL uses it to notice backends that outlived their server. An empty file, from a crash
    before it was filled, has no key; PostgreSQL would refuse to start with it.
    """
    if not file.exists():
        return
    if lines := file.read_text().splitlines():
        file.write_text("\n".join([NOBODYS_PID, *lines[1:]]) + "\n")
    else:
        file.unlink()


def _free_port(saved: Path) -> int:
    """Return the last port if it is free, so that saved addresses keep working, else any port."""
    for wanted in (saved.read_text() if saved.exists() else "0", "0"):
        with socket.socket() as probe, contextlib.suppress(OSError, ValueError, OverflowError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, int(wanted)))
            return int(probe.getsockname()[1])
    raise PostgresError(f"no port of {HOST} is free: stop some programs")


def _password(base: Path) -> str:
    """Return the password of the superuser and the project's role; create it before anything else.

    The password of the service's role can be created at any time, because each migration sets it.
    """
    file = base / "password"
    if not file.exists() and (base / "data").exists():
        raise PostgresError(f"{file} is gone: restore it, or remove {base} with its data")
    _kept_secret(base / "service-password")
    return _kept_secret(file)


def _kept_secret(file: Path) -> str:
    """Return the file's secret; create a missing file, which gets its name once it is complete."""
    if not file.exists():
        new = file.with_name(f"{file.name}.new")
        new.touch(0o600)
        new.write_text(secrets.token_urlsafe(24))
        programs.give_to_account(new)
        new.replace(file)
    return file.read_text()


def _initialise(base: Path, binaries: Path, version: int) -> None:
    """Create the data directory; it gets its name once it is complete."""
    fresh = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=base))
    programs.give_to_account(fresh)
    command = [str(binaries / "initdb"), "-D", str(fresh), "-U", "postgres", "-A", "scram-sha-256"]
    command += [f"--pwfile={base / 'password'}", "--encoding=UTF8", "--locale=C"]
    command += ["--no-sync"]  # a sync takes many seconds on some disks, and there is no data yet
    if version >= BUILTIN_LOCALES_SINCE:
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    done = subprocess.run(command, check=False, capture_output=True, **programs.as_account(base))
    if done.returncode:
        problem = _one_line(os.fsdecode(done.stderr))
        raise PostgresError(f"initdb failed: {problem}; fix that, {ELSEWHERE}")
    fresh.rename(base / "data")


def _connect(port: int, password: str, database: str = "postgres") -> psycopg.Connection:
    server = f"host={HOST} port={port} sslmode=disable gssencmode=disable connect_timeout=5"
    superuser = f"user=postgres dbname={database}"
    return psycopg.connect(f"{server} {superuser}", password=password, autocommit=True)


def _provide_database(port: int, password: str) -> None:
    """Create the project's role and database, unless they exist already."""
    names = {"name": sql.Identifier(NAME), "password": sql.Literal(password)}
    role = sql.SQL("CREATE ROLE {name} LOGIN CREATEDB CREATEROLE PASSWORD {password}")
    database = sql.SQL("CREATE DATABASE {name} OWNER {name}")
    with _connect(port, password) as connection:
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [NAME]).rowcount:
            connection.execute(role.format(**names))
        if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount:
            connection.execute(database.format(**names))
    # `migrate` could not, and would say so each time. New databases are copies of template1.
    for database_name in ("template1", NAME):
        with _connect(port, password, database_name) as connection:
            connection.execute(_WITHOUT_LARGE_OBJECTS)


def _one_line(text: str) -> str:
    """Return the last lines of a text as one line."""
    return " | ".join(line.strip() for line in text.strip().splitlines()[-6:])
