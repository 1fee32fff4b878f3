"""Outages of a PostgreSQL that we started; each lasts while the caller's block runs."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import LiteralString

import psutil
from psycopg import sql

from notifier.store.db import Connection
from tools.dev import cluster, postgres
from tools.rig import owner, wait_until


@contextmanager
def stopped(server: postgres.Server) -> Iterator[None]:
    """Stop the server: connections are refused."""
    cluster.stop(server.base)
    try:
        yield
    finally:
        _start_again(server)


@contextmanager
def restarted(server: postgres.Server) -> Iterator[None]:
    """Restart the server: every connection ends, and new ones are soon accepted."""
    with stopped(server):
        pass
    yield


@contextmanager
def killed(server: postgres.Server) -> Iterator[None]:
    """Kill the server: connections are refused, and the server then recovers from the crash."""
    postmaster = _postmaster(server)
    for process in [postmaster, *postmaster.children()]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    try:
        yield
    finally:
        _start_again(server)


@contextmanager
def hanging(server: postgres.Server) -> Iterator[None]:
    """Suspend the server: the kernel accepts connections, and no process reads from them.

    A shell resumes the processes when its standard input ends, even if we are killed.
    """
    with subprocess.Popen(
        ["/bin/sh", "-c", "kill -CONT $(cat)"],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        postmaster = _postmaster(server)
        print(postmaster.pid, file=shell.stdin, flush=True)
        postmaster.suspend()  # first, so that it forks no more children
        for process in postmaster.children():
            print(process.pid, file=shell.stdin, flush=True)
            process.suspend()
        yield


@contextmanager
def not_accepting(server: postgres.Server) -> Iterator[None]:
    """End every connection to the database, and refuse new ones."""
    name = server.env["DB_NAME"]
    with owner(server, DB_NAME="postgres").connect() as elsewhere:
        _allow_connections(elsewhere, name, "false")
        try:
            wait_until(lambda: not _end_sessions(elsewhere, name))
            yield
        finally:
            _allow_connections(elsewhere, name, "true")


def _start_again(server: postgres.Server) -> None:
    """Start the server on its old port, not as our child; return once it accepts connections."""
    postgres.acquire(server.base).close()  # `server` is still our share in it


def _postmaster(server: postgres.Server) -> psutil.Process:
    lines = (server.base / "data" / "postmaster.pid").read_text().splitlines()
    return psutil.Process(int(lines[0]))


def _allow_connections(elsewhere: Connection, name: str, allowed: LiteralString) -> None:
    statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    elsewhere.execute(statement.format(sql.Identifier(name), sql.SQL(allowed)))


def _end_sessions(elsewhere: Connection, name: str) -> int:
    """Terminate all sessions of the database; return how many there were.

    It sends signals, because pg_terminate_backend() ends only sessions of the caller's own role.
    """
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s"
    sessions = elsewhere.execute(query, (name,)).fetchall()
    for (pid,) in sessions:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return len(sessions)
