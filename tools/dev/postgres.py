"""The project's own PostgreSQL, for development and tests, used while DB_HOST is unset.

    python -m tools.dev.postgres COMMAND [ARG...]   # COMMAND finds the server in DB_*
    with postgres.server(ephemeral=True) as env: ...   # the same for a test session

Everything is in one directory: data, passwords, port, server.log and three lock files:

    users.lock   shared by every process that uses the server; exclusive for the one that stops it
    start.lock   exclusive while the server is being started or stopped; taken after users.lock
    watch.lock   held by the only watcher

The kernel releases a file lock when the last process that has the file open ends, however it ends.
So a detached process, the watcher, starts the server, waits until users.lock is free, and then
stops the server. No user has to clean up, even if it is killed while the server starts.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tools import HOST, ROOT
from tools.dev import cluster, programs
from tools.dev.programs import ELSEWHERE, PostgresError

__all__ = [
    "PostgresError",
    "Server",
    "acquire",
    "ignored",
    "join",
    "main",
    "server",
    "serving",
    "unproxied",
    "without_database",
]

READY = "ready"


@dataclass(frozen=True, slots=True)
class Server:
    """A share in a running server, until `close()`, its garbage collection or the process's end."""

    env: dict[str, str] = field(repr=False)  # DB_HOST, DB_PORT and so on, with the passwords
    base: Path
    ephemeral: bool
    lock: IO[bytes]  # users.lock; a process that inherits the open file has a share as well

    def close(self) -> None:
        """Give up the share; if it was the last one, the server has stopped on return."""
        _release(self.base, self.lock, self.ephemeral)


def acquire(base: Path | None = None, *, ephemeral: bool = False) -> Server:
    """Start or join the server in directory `base`, by default the project's own.

    An ephemeral server gets a directory of its own, which is removed when it stops. It is fast, but
    loses its data in a power cut. Raises PostgresError.
    """
    if base and ephemeral:
        raise ValueError("an ephemeral server takes no directory, because it would remove it")
    base = base or _default_directory(ephemeral)
    with cluster.explained(base):
        base = base.resolve()
        _prepare(base)
        users = _lock(base / "users.lock", fcntl.LOCK_SH)  # waits while a server is being stopped
        try:
            _start_watcher(base, ephemeral)
            return Server(cluster.environment(base), base, ephemeral, users)
        except BaseException:
            _release(base, users, ephemeral)
            raise


@contextlib.contextmanager
def server(base: Path | None = None, *, ephemeral: bool = False) -> Iterator[dict[str, str]]:
    """Yield the DB_* variables of a server (see `acquire`), without a change to os.environ."""
    share = acquire(base, ephemeral=ephemeral)
    try:
        yield share.env
    finally:
        share.close()


def join() -> Server | None:
    """Start or join the project's own server, and replace the DB_* variables of os.environ by its.

    If DB_HOST is set, change nothing and return None. Raises PostgresError.
    """
    if os.environ.get("DB_HOST", "").strip():
        return None
    share = acquire()
    for name in os.environ.keys() - without_database(os.environ).keys():
        del os.environ[name]
    os.environ |= share.env
    return share


def main(arguments: list[str]) -> int:
    """Become the command, with a server in DB_*; return an exit status only if that fails."""
    if not arguments:
        return _complain("usage: python -m tools.dev.postgres COMMAND [ARG...]", 2)
    if shutil.which(arguments[0]) is None:
        return _complain(f"{arguments[0]}: command not found", 127)
    try:
        share = join()
        if share:
            os.set_inheritable(share.lock.fileno(), True)  # the command and its children share it
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python; exec would pass that on
            signal.signal(ignored, signal.SIG_DFL)
        os.execvp(arguments[0], arguments)  # noqa: S606 - the user's own command
    except PostgresError as error:
        return _complain(str(error), 1)
    except OSError as error:
        return _complain(f"{arguments[0]}: {error.strerror}", 126)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def without_database(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `environment` without the DB_* variables."""
    return {name: value for name, value in environment.items() if not name.startswith("DB_")}


def ignored(environment: Mapping[str, str]) -> str:
    """Return a line about the DB_* variables that have no effect without DB_HOST; "" for none."""
    names = [n for n, value in environment.items() if n.startswith("DB_") and value.strip()]
    if not names or environment.get("DB_HOST", "").strip():
        return ""
    return f"DB_HOST is not set: ignoring {', '.join(sorted(names))}, using make run's database"


def unproxied(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `no_proxy` of `environment`, extended by 127.0.0.1: our servers need no proxy."""
    others = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return {"no_proxy": others if others.strip() == "*" else f"{others},{HOST}"}


def serving(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `environment` without the migrating role, as the service should have it."""
    return {n: value for n, value in environment.items() if not n.startswith("DB_MIGRATION_")}


def _complain(message: str, status: int) -> int:
    print(f"postgres: {message}", file=sys.stderr)
    return status


def _default_directory(ephemeral: bool) -> Path:
    """Return the default directory; root's is one that the server's account can enter.

    Root's TMPDIR and home may be closed to that account.
    """
    root = programs.account() is not None
    if ephemeral:
        shared = "/tmp" if root else None  # noqa: S108 - mkdtemp makes a private directory in it
        return Path(tempfile.mkdtemp(prefix="notifier-postgres-", dir=shared))
    if named := os.environ.get("EMBEDDED_PG_DIR"):
        return Path(named)
    if root:
        project = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:10]
        return Path("/var/lib") / f"notifier-postgres-{project}"
    return ROOT / ".postgres"


def _prepare(base: Path) -> None:
    """Create the directory, closed to all others; root's server account may only pass through."""
    if base.exists() and any(base.iterdir()) and not (base / "users.lock").exists():
        raise PostgresError(f"{base} holds other files: empty it, {ELSEWHERE}")
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o711 if programs.account() else 0o700)


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "rb")


def _lock(path: Path, kind: int) -> IO[bytes]:
    """Open the file and lock it until it is closed."""
    file = _open(path)
    try:
        fcntl.flock(file, kind)
    except BaseException:
        file.close()
        raise
    return file


def _start_watcher(base: Path, ephemeral: bool) -> None:
    """Start the server and its watcher, not as our children; return once it accepts connections."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    done = subprocess.run(
        [sys.executable, "-m", "tools.dev.postgres", "--watch", base, "1" if ephemeral else "0"],
        check=False,
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # ends when the watcher closes it, after its reply
        stderr=subprocess.STDOUT,
        start_new_session=True,  # the terminal's Ctrl-C must not reach it
    )
    reply = os.fsdecode(done.stdout).splitlines() or ["the start was interrupted: try again"]
    if reply[-1] != READY:
        raise PostgresError(reply[-1])


def _watch(base: Path, ephemeral: bool) -> None:
    """Start the server, write a reply to standard output, and stop the server when unused."""
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    watch = None
    with _lock(base / "start.lock", fcntl.LOCK_EX):
        reply = _try_start(base, ephemeral)
        with contextlib.suppress(BlockingIOError):
            watch = _lock(base / "watch.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
    users = _open(base / "users.lock")  # of this directory, even if it is removed after the reply
    _say_last(reply)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ended server leaves no zombie
    if watch:
        fcntl.flock(users, fcntl.LOCK_EX)
        # Before the stop: a process that holds start.lock and finds watch.lock taken relies on us.
        watch.close()
        _shut_down(base, users, ephemeral)


def _try_start(base: Path, ephemeral: bool) -> str:
    """Start the server; return READY, or the problem in one line."""
    try:
        cluster.start(base, unsafe=ephemeral)
    except PostgresError as error:
        return str(error)
    return READY


def _say_last(reply: str) -> None:
    """Write to standard output and close it."""
    with contextlib.suppress(BrokenPipeError):  # the reader may have been killed
        os.write(sys.stdout.fileno(), os.fsencode(f"{reply}\n"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    os.chdir("/")


def _release(base: Path, users: IO[bytes], ephemeral: bool) -> None:
    """Give up a share of users.lock; the last user stops the server itself."""
    with users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(users, fcntl.LOCK_SH)  # at once beside others; else after the stop
        else:
            _shut_down(base, users, ephemeral)
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)  # also for copies in forked children


def _shut_down(base: Path, users: IO[bytes], ephemeral: bool) -> None:
    """Stop the server; the caller has `users` locked exclusively."""
    lock = base / "users.lock"
    if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(users.fileno())):
        return  # the directory was removed; a new one belongs to other users
    with _lock(base / "start.lock", fcntl.LOCK_EX):
        cluster.stop(base)
        if ephemeral:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watch"]:
        _watch(Path(sys.argv[2]), ephemeral=sys.argv[3] == "1")
    else:
        sys.exit(main(sys.argv[1:]))
