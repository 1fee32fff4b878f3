"""Faults of the machine that harm one process only."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.timing import eventually
from tools import machine

pytestmark = pytest.mark.usefixtures("processes")

LIMIT = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"

# Tries to take a block, once for each line of its input.
WRITER = f"""
import sys
for line in sys.stdin:
    try:
        with open("{machine.MEMORY}/a file", "ab", buffering=0) as file:
            print(file.write(bytes(4096)), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b".")


def test_a_command_runs_with_few_descriptors() -> None:
    command = [*machine.few_files(123), sys.executable, "-c", LIMIT]
    assert subprocess.check_output(command, text=True) == "(123, 123)\n"


@pytest.mark.needs("tmpfs")
def test_a_private_memory_file_system_is_full_only_during_the_block() -> None:
    command = [*machine.private_memory(), sys.executable, "-c", WRITER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin
        assert writer.stdout

        def written() -> str:
            print("once", file=writer.stdin, flush=True)
            return str(writer.stdout.readline().strip())  # type: ignore[union-attr]

        assert written() == "4096"
        with machine.full_memory(writer.pid):
            assert written() == "No space left on device"
        assert written() == "4096"
        left = Path(f"/proc/{writer.pid}/root{machine.MEMORY}").iterdir()
        assert [path.name for path in left] == ["a file"]
        writer.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/shm")
def test_the_memory_file_system_of_the_machine_is_never_filled() -> None:
    with pytest.raises(ValueError, match="shares /dev/shm"), machine.full_memory(os.getpid()):
        pass


def test_a_machine_without_namespaces_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.without_private_memory() == "unshare is not installed"
    refused = tmp_path / "unshare"
    refused.write_text("#!/bin/sh\necho unshare: Operation not permitted >&2; exit 1\n")
    refused.chmod(0o700)
    assert machine.without_private_memory() == "unshare: Operation not permitted"


def test_a_stalled_reader_reads_nothing_and_later_everything(tmp_path: Path) -> None:
    log = tmp_path / "worker-1.log"
    with machine.log_reader(tmp_path) as reader:
        pipe = machine.open_log_pipe(tmp_path / "worker-1.pipe")
        os.write(pipe, b"first\n")
        eventually(lambda: log.exists() and log.read_text() == "first\n")
        with reader.stalled():
            os.write(pipe, b"second\n")
            fill(pipe)
            assert log.read_text() == "first\n"
        eventually(lambda: log.stat().st_size > 2**16)
        os.write(pipe, b"last\n")
        os.close(pipe)
    text = log.read_text()
    assert text.startswith("first\nsecond\n..")
    assert text.endswith("..last\n")


def test_the_standard_output_of_a_command_goes_to_a_pipe(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    command = [*machine.logging_to(tmp_path / "service.pipe"), "/bin/sh", "-c", "echo hello; cat"]
    with (
        machine.log_reader(tmp_path),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        eventually(lambda: log.exists() and log.read_text() == "hello\n")
        assert process.communicate() == (b"", None)
