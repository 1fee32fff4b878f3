"""The memory that the workers of one master share, used by several processes at once."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from notifier.serving import master
from notifier.sharing import snapshot as snapshot_module
from notifier.sharing.snapshot import LARGEST, LOCK_WAIT, Snapshot
from tests.timing import within

ROOT = Path(__file__).parent.parent

# A process that has inherited a snapshot, as `shared`.
WORKER = """
import os, resource, signal, sys, time
from notifier.sharing.snapshot import Snapshot

shared = Snapshot.__new__(Snapshot)
shared._fd = int(sys.argv[1])
"""


@pytest.fixture
def shared() -> Iterator[Snapshot]:
    snapshot = Snapshot()
    yield snapshot
    snapshot.close()


def put(snapshot: Snapshot, value: bytes) -> None:
    snapshot.replace(lambda _: value)


def worker(snapshot: Snapshot, code: str) -> subprocess.Popen[str]:
    """Start a process that runs `code` with the snapshot."""
    command = [sys.executable, "-c", WORKER + code, str(snapshot._fd)]
    return subprocess.Popen(
        command, cwd=ROOT, pass_fds=[snapshot._fd], stdout=subprocess.PIPE, text=True
    )


def run(snapshot: Snapshot, code: str) -> int:
    with worker(snapshot, code) as process:
        return process.wait(30)


def test_a_value_replaces_the_one_before_it_whatever_their_sizes(shared: Snapshot) -> None:
    assert shared.read() == b""
    for value in (b"one", b"", b"x" * LARGEST, b"two", os.urandom(10_000), b"three"):
        put(shared, value)
        assert shared.read() == value


def test_a_value_that_is_not_chosen_leaves_the_one_before_it(shared: Snapshot) -> None:
    put(shared, b"one")
    seen: list[bytes] = []
    shared.replace(seen.append)
    assert (seen, shared.read()) == ([b"one"], b"one")


@pytest.mark.usefixtures("processes")
def test_processes_see_each_others_values(shared: Snapshot) -> None:
    put(shared, b"ours")
    assert run(shared, "shared.replace(lambda value: value + b' and theirs')") == 0
    assert shared.read() == b"ours and theirs"


@pytest.mark.usefixtures("processes")
def test_simultaneous_changes_are_all_kept(shared: Snapshot) -> None:
    add = "for _ in range(500): shared.replace(lambda value: value + sys.argv[1].encode())"
    workers = [worker(shared, add) for _ in range(3)]
    for each in workers:
        with each:
            assert each.wait(60) == 0
    assert len(shared.read()) == 1500 * len(str(shared._fd))


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("written", [0, 5, 20, 4000, 9_000])
def test_a_process_that_is_killed_while_it_writes_leaves_the_value_before(
    shared: Snapshot, written: int
) -> None:
    for value in (b"a" * 10_000, b"b" * 10_000):
        put(shared, value)
    killed = f"""
pwrite = os.pwrite
def killed(fd, data, offset):
    pwrite(fd, data[:{written}], offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = killed
shared.replace(lambda value: b"c" * 10_000)
"""
    assert run(shared, killed) == -signal.SIGKILL
    assert shared.read() == b"b" * 10_000
    put(shared, b"next")
    assert shared.read() == b"next"


def test_a_value_that_is_too_large_leaves_none(shared: Snapshot) -> None:
    """The value before it is out of date."""
    put(shared, b"one")
    with pytest.raises(OSError, match="File too large") as error:
        put(shared, b"x" * (LARGEST + 1))
    assert error.value.errno == errno.EFBIG
    assert shared.read() == b""
    put(shared, b"two")
    assert shared.read() == b"two"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("limit", [0, 10_000])
def test_without_room_for_a_value_there_is_none_and_no_signal(shared: Snapshot, limit: int) -> None:
    """Mapped memory would raise SIGBUS."""
    put(shared, b"one")
    short = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    shared.replace(lambda value: b"x" * 100_000)
except OSError:
    sys.exit(3)
"""
    assert run(shared, short) == 3
    assert shared.read() == b""


@pytest.mark.usefixtures("processes")
def test_a_process_that_hangs_with_the_memory_delays_the_others_only_for_a_while(
    shared: Snapshot,
) -> None:
    put(shared, b"one")
    hangs = "shared.replace(lambda value: print('holds', flush=True) or time.sleep(60))"
    with worker(shared, hangs) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        for use in (shared.read, lambda: put(shared, b"two")):
            with within(LOCK_WAIT + 1), pytest.raises(TimeoutError):
                use()
        process.kill()
        process.wait(30)
    assert shared.read() == b"one"


def test_other_programs_do_not_inherit_the_memory(shared: Snapshot) -> None:
    assert not os.get_inheritable(shared._fd)


def test_a_system_without_anonymous_memory_has_a_file_without_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(snapshot_module.tempfile, "tempdir", str(tmp_path))
    snapshot = Snapshot()
    put(snapshot, b"one")
    assert snapshot.read() == b"one"
    assert (os.fstat(snapshot._fd).st_mode & 0o777, [*tmp_path.iterdir()]) == (0o600, [])
    assert not os.get_inheritable(snapshot._fd)
    snapshot.close()


def test_a_master_that_cannot_get_the_memory_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def short(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(snapshot_module, "_memory", short)
    assert master.make_snapshot() is None
    (record,) = caplog.records
    assert record.msg == "workers cannot hand over providers"
    assert record.__dict__["reason"] == os.strerror(errno.EMFILE)
