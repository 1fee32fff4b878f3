"""Ways for a PostgreSQL of our own to be away while a block of the caller's runs."""

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
    """Let connections be refused."""
    cluster.stop(server.base)
    try:
        yield
    finally:
        _start_again(server)


@contextmanager
def restarted(server: postgres.Server) -> Iterator[None]:
    """Let every connection end; new ones are soon taken again."""
    with stopped(server):
        pass
    yield


@contextmanager
def killed(server: postgres.Server) -> Iterator[None]:
    """Let connections be refused, and the server then recover from a crash."""
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
    """Let nothing be answered: the kernel takes connections, and nobody reads what comes on them.

    Whatever becomes of us, the shell lets the processes go on when its standard input ends.
    """
    with subprocess.Popen(
        ["/bin/sh", "-c", "kill -CONT $(cat)"],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        postmaster = _postmaster(server)
        print(postmaster.pid, file=shell.stdin, flush=True)
        postmaster.suspend()  # first: from now on it has no new children
        for process in postmaster.children():
            print(process.pid, file=shell.stdin, flush=True)
            process.suspend()
        yield


@contextmanager
def not_accepting(server: postgres.Server) -> Iterator[None]:
    """Let the server end every connection to the database, and take no new one."""
    name = server.env["DB_NAME"]
    with owner(server, DB_NAME="postgres").connect() as elsewhere:
        _allow_connections(elsewhere, name, "false")
        try:
            wait_until(lambda: not _end_sessions(elsewhere, name))
            yield
        finally:
            _allow_connections(elsewhere, name, "true")


def _start_again(server: postgres.Server) -> None:
    """Return once it takes connections again: on its old port, and as no child of ours."""
    postgres.acquire(server.base).close()  # we still have our share


def _postmaster(server: postgres.Server) -> psutil.Process:
    lines = (server.base / "data" / "postmaster.pid").read_text().splitlines()
    return psutil.Process(int(lines[0]))


def _allow_connections(elsewhere: Connection, name: str, allowed: LiteralString) -> None:
    statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    elsewhere.execute(statement.format(sql.Identifier(name), sql.SQL(allowed)))


def _end_sessions(elsewhere: Connection, name: str) -> int:
    """Do what pg_terminate_backend may only for one's own role; return how many there were."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s"
    sessions = elsewhere.execute(query, (name,)).fetchall()
    for (pid,) in sessions:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return len(sessions)
