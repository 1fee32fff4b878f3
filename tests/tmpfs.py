"""A service whose /dev/shm is a small tmpfs of its own, which a test can fill."""

import os
import subprocess
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

from tests.service import Service

_MOUNT = 'mount -t tmpfs -o "$0" tmpfs /dev/shm && exec "$@"'

BLOCK = 4096


def within(options: str) -> tuple[str, ...]:
    """Return a command that executes its arguments with a /dev/shm of these options."""
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT, options)


@cache
def is_allowed() -> bool:
    """Return True if this machine lets this user mount one."""
    try:
        done = subprocess.run([*within("size=1m"), "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def folder(service: Service) -> Path:
    """Return the path at which this process sees the service's /dev/shm."""
    return Path(f"/proc/{service.process.pid}/root/dev/shm")


def fill(service: Service) -> Path:
    """Take all free blocks of the service's /dev/shm; return the file that holds them."""
    filler = folder(service) / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(BLOCK))
    assert os.statvfs(filler).f_bfree == 0
    return filler


def take_all_names(service: Service) -> None:
    """Make files in the service's /dev/shm until it has room for none, not even an empty one."""
    with suppress(OSError):
        for number in count():
            (folder(service) / f"name-{number}").touch()
    assert os.statvfs(folder(service)).f_ffree == 0
