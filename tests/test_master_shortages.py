"""gunicorn's master when the system lacks room: it goes on, and tries again."""

import errno
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from prometheus_client import multiprocess

from notifier.serving import master

NUMBERS = [errno.ENOSPC, errno.EMFILE, errno.EAGAIN, errno.ENOMEM, errno.EACCES]


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def arbiter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A master whose workers cannot be started, after `when_ready`."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    monkeypatch.setattr(master, "MEMORY", str(tmp_path))
    names = ("handle_term", "handle_hup", "manage_workers", "spawn_worker")
    server = SimpleNamespace(**dict.fromkeys(names, failing(errno.ENOSPC)))
    server.cfg, server.pid, server.WORKERS = Config(), os.getpid(), {}
    server.cfg.set("worker_tmp_dir", str(tmp_path))
    master.when_ready(server, SimpleNamespace(drain_delay=0))  # type: ignore[arg-type]
    return server


@pytest.mark.parametrize("number", NUMBERS)
def test_a_worker_that_cannot_be_started_does_not_end_the_master(
    number: int, arbiter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spawn = failing(number)
    once = master.logs.OncePerSecond()
    for _ in range(3):
        master._spawn(arbiter, once, spawn)
    (line,) = caplog.records
    assert (line.message, line.levelno) == ("worker not started", logging.ERROR)
    assert line.__dict__["reason"] == os.strerror(number)


def test_the_heartbeat_uses_the_other_folder_after_each_failure(
    arbiter: Any, tmp_path: Path
) -> None:
    folders = []
    for _ in range(4):
        folders.append(arbiter.cfg.worker_tmp_dir)
        arbiter.spawn_worker()
    assert folders == [str(tmp_path), None, str(tmp_path), None]


def test_an_error_in_the_new_worker_does_not_make_it_a_master(arbiter: Any) -> None:
    arbiter.pid += 1
    with pytest.raises(OSError, match="No space left"):
        arbiter.spawn_worker()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_metrics_folder_that_cannot_be_made_again_does_not_end_the_master(
    number: int, arbiter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(number))
    worker = SimpleNamespace()
    master.pre_fork(arbiter, worker)
    assert worker.slot == 0
    assert isinstance(worker.serving, mmap.mmap)


def test_gauges_that_cannot_be_removed_do_not_end_the_master(
    arbiter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocess, "mark_process_dead", failing(errno.EACCES))
    master.child_exit(arbiter, SimpleNamespace(slot=0))


def test_metrics_go_to_the_other_folder_if_the_better_one_has_no_room_for_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make = tempfile.mkdtemp
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(master, "MEMORY", str(memory))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    unusable: list[str | None] = []

    def mkdtemp(prefix: str, dir: str | None) -> str:  # noqa: A002
        if dir in unusable:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    for free, without, parent in (
        (2**30, [], memory),
        (2**30, [str(memory)], tmp_path),
        (0, [], tmp_path),
        (0, [None], memory),
    ):
        unusable[:] = without
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert master.make_metrics_folder().parent == parent
