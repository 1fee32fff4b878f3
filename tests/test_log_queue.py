"""The queue of log lines: readers that stall, leave or are slow; a full disk; forks and exits."""

import errno
import fcntl
import logging
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from notifier.serving import log_queue
from notifier.serving.log_queue import FLUSH_SECONDS, MAX_LINES, QueueHandler
from tests.timing import within

ROOT = Path(__file__).parent.parent

PIPE_BYTES = 4096  # the smallest pipe
FILLER = "x" * (PIPE_BYTES - 1)
GAP = "log lines dropped"

Write = Callable[[int, bytes, float | None], int]


class Log:
    """A handler that writes to a pipe. Nobody reads until a test does."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.stream = os.fdopen(writer, "w")
        self.handler = QueueHandler(self.stream)
        self.handler.setFormatter(logging.Formatter("%(message)s %(lines)s", defaults={"lines": 1}))
        self.dropped: list[int] = []
        self._read = b""

    def start(self) -> None:
        self.handler.start(self.dropped.append)

    def line(self, text: object) -> None:
        self.handler.handle(logging.makeLogRecord({"msg": text}))

    def lines(self, count: int) -> list[str]:
        """Wait for that many lines, and return them."""
        while self._read.count(b"\n") < count:
            assert select.select([self.reader], [], [], 20)[0], self._read
            self._read += os.read(self.reader, PIPE_BYTES)
        *lines, self._read = self._read.split(b"\n", count)
        return [line.decode() for line in lines]

    def fill(self) -> None:
        """Fill the pipe, as another process can that writes to it."""
        os.write(self.stream.fileno(), f"{FILLER}\n".encode())

    def close(self) -> None:
        os.close(self.reader)  # so that the handler does not wait
        self.handler.close()
        self.stream.close()


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    yield log
    log.close()


@pytest.fixture
def few_lines(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many lines a queue holds."""
    monkeypatch.setattr(log_queue, "MAX_LINES", 100)
    return 100


def numbered(count: int) -> list[str]:
    return [f"{number} 1" for number in range(count)]


def test_lines_arrive_in_the_order_of_each_thread(log: Log) -> None:
    log.start()

    def write(thread: int) -> None:
        for number in range(200):
            log.line(f"{thread}: {number}")

    with ThreadPoolExecutor(8) as pool:
        written = [pool.submit(write, thread) for thread in range(8)]
        lines = log.lines(1600)
    assert [call.result() for call in written] == [None] * 8
    for thread in range(8):
        own = [line for line in lines if line.startswith(f"{thread}: ")]
        assert own == [f"{thread}: {number} 1" for number in range(200)]
    assert sum(log.dropped) == 0


def test_a_stalled_reader_holds_up_nobody_and_each_dropped_line_counts(log: Log) -> None:
    log.fill()
    log.start()
    with within(10):
        for number in range(MAX_LINES + 500):
            log.line(number)
    assert sum(log.dropped) == 500
    assert log.lines(1 + MAX_LINES + 1) == [FILLER, *numbered(MAX_LINES), f"{GAP} 500"]
    log.line("after")
    assert log.lines(1) == ["after 1"]
    assert sum(log.dropped) == 500


@pytest.mark.parametrize("start", [True, False], ids=["with a thread", "without"])
def test_the_line_about_dropped_lines_stands_where_they_are_missing(
    log: Log, few_lines: int, start: bool
) -> None:
    if start:
        log.start()
    for dropped in (1, 2):
        log.fill()
        for number in range(few_lines + dropped):
            log.line(number)
        assert log.lines(1) == [FILLER]
        lines = []
        while len(lines) < few_lines + 1:
            if not start:
                log.handler.write_queued()
            lines += log.lines(1)
        assert lines == [*numbered(few_lines), f"{GAP} {dropped}"]


@pytest.mark.usefixtures("few_lines")
def test_a_slow_reader_gets_or_is_told_of_every_line(log: Log) -> None:
    log.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: [log.line("a line") for _ in range(5000)])
        told = 0
        while told < 5000:
            (line,) = log.lines(1)
            told += int(line.rpartition(" ")[2])
    assert told == 5000


def test_without_a_thread_a_line_is_written_at_once(log: Log) -> None:
    log.line("a line")
    assert os.read(log.reader, 100) == b"a line 1\n"


def test_without_a_thread_lines_wait_until_the_next_call(log: Log) -> None:
    log.fill()
    with within(5):
        for number in range(3):
            log.line(number)
    assert log.lines(1) == [FILLER]
    log.handler.write_queued()
    assert log.lines(3) == numbered(3)


def test_the_lines_before_and_after_the_start_of_the_thread_keep_their_order(log: Log) -> None:
    log.fill()
    log.line(0)
    log.start()
    log.line(1)
    assert log.lines(3) == [FILLER, *numbered(2)]


def test_drops_before_the_start_of_the_thread_count_too(log: Log, few_lines: int) -> None:
    log.fill()
    for number in range(few_lines + 7):
        log.line(number)
    log.start()
    assert sum(log.dropped) == 7


@pytest.mark.parametrize("start", [True, False], ids=["with a thread", "without"])
def test_a_line_that_is_longer_than_an_atomic_write_arrives_whole(log: Log, start: bool) -> None:
    if start:
        log.start()
    texts = ["a" * 10, "b" * 3 * PIPE_BYTES, "c" * 10]
    for text in texts:
        log.line(text)
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit(log.lines, 3)
        while not start and not lines.done():
            log.handler.write_queued()
        assert lines.result() == [f"{text} 1" for text in texts]


@pytest.mark.parametrize("start", [True, False], ids=["with a thread", "without"])
def test_a_reader_that_has_left_costs_lines_only(
    start: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log()
    if start:
        log.start()
    os.close(log.reader)
    for number in range(10):
        log.line(number)
    with within(FLUSH_SECONDS):
        log.handler.close()
    log.stream.close()
    assert sum(log.dropped) == (10 if start else 0)
    assert capfd.readouterr() == ("", "")


class Disk:
    """Replaces `log_queue.write`: a file that can be full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.content = b""

    def __call__(self, _fd: int, data: bytes, _until: float | None) -> int:
        data = data[: self.room]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        self.content += data
        return len(data)


def test_a_full_disk_costs_lines_and_leaves_later_lines_whole(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(room=len("0 1\n1 1\n2"))
    monkeypatch.setattr(log_queue, "write", disk)
    for number in range(6):
        log.line(number)
    disk.room = 1000
    log.line(6)
    assert disk.content.decode().splitlines() == ["0 1", "1 1", "2", "6 1", f"{GAP} 4"]


def test_a_disk_that_fills_up_within_a_write_costs_the_rest_of_its_lines(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(room=len("0 1\n1"))
    log.fill()
    for number in range(5):
        log.line(number)
    monkeypatch.setattr(log_queue, "write", disk)
    log.handler.write_queued()
    for disk.room in (4, 1000):  # first for a part of the line about the others
        log.handler.write_queued()
    log.line(5)
    assert disk.content.decode().splitlines() == ["0 1", "1", GAP[:3], f"{GAP} 4", "5 1"]


def test_a_file_gets_the_lines_too(tmp_path: Path) -> None:
    with (tmp_path / "log").open("a") as stream:
        handler = QueueHandler(stream)
        handler.start(lambda _: None)
        handler.handle(logging.makeLogRecord({"msg": "a line"}))
        handler.close()
    assert (tmp_path / "log").read_text() == "a line\n"


def test_without_stdout_lines_are_lost_silently() -> None:
    handler = QueueHandler(None)
    handler.handle(logging.makeLogRecord({"msg": "a line"}))
    handler.close()


def test_the_flags_that_other_processes_share_do_not_change(log: Log) -> None:
    log.start()
    log.line("a line")
    assert log.lines(1) == ["a line 1"]
    assert not fcntl.fcntl(log.stream.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_write_does_not_block_even_if_another_process_fills_the_pipe_after_the_poll(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overtaken:
        register = staticmethod(lambda *_: None)
        poll = staticmethod(lambda _: log.fill() or [True])  # type: ignore[func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr(select, "poll", Overtaken)
        with within(5):
            log.line("a line")
    assert log.lines(1) == [FILLER]
    log.handler.write_queued()
    assert log.lines(1) == ["a line 1"]


@pytest.mark.parametrize("start", [True, False], ids=["with a thread", "without"])
def test_a_terminal_that_is_paused_holds_up_nobody(start: bool) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb", closefd=False) as terminal:
        handler = QueueHandler(stream)
        if start:
            handler.start(lambda _: None)
        with within(5):
            for number in range(2000):
                handler.handle(logging.makeLogRecord({"msg": f"{number:0100}"}))
        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(lambda: [int(terminal.readline()) for _ in range(2000)])
            while not start and not seen.done():
                handler.write_queued()
            assert seen.result() == [*range(2000)]
        handler.close()
    os.close(reader)


def test_text_for_stderr_is_dropped_while_its_reader_stalls(log: Log) -> None:
    stderr = log_queue.dropping(log.stream)
    assert stderr.fileno() != log.stream.fileno()
    print("first", file=stderr)
    assert log.lines(1) == ["first"]
    log.fill()
    with within(5):
        print("second", file=stderr)
    assert log.lines(1) == [FILLER]
    print("third \udcff", file=stderr)
    assert log.lines(1) == ["third \\udcff"]


def test_text_for_a_stderr_without_a_reader_raises_nothing() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        stderr = log_queue.dropping(stream)
        os.close(reader)
        print("a line", file=stderr)


PROGRAM = """
import logging, os, signal, sys, threading
from notifier.serving.log_queue import QueueHandler

handler = QueueHandler(sys.stdout)
logging.basicConfig(handlers=[handler], format="%(message)s", level="INFO")
"""

ENDS = {
    "return": "",
    "sys.exit": "sys.exit(3)",
    "exception": "raise RuntimeError",
    "signal": "signal.signal(signal.SIGABRT, lambda *_: sys.exit(1)); os.kill(os.getpid(), 6)",
    "thread": "threading.Timer(0.2, lambda: logging.info('last of a thread')).start()",
}


def run(program: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM + program]
    return subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("start", ["handler.start(lambda _: None)", ""], ids=["thread", "without"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.usefixtures("processes")
def test_the_last_lines_of_a_process_come_out(end: str, start: str) -> None:
    log = "[logging.info(number) for number in range(1000)]"
    out, _ = run(f"{start}\n{log}\n{ENDS[end]}\n").communicate(timeout=60)
    lines = [str(number) for number in range(1000)]
    assert out.splitlines() == lines + (["last of a thread"] if end == "thread" else [])


@pytest.mark.parametrize("start", ["handler.start(lambda _: None)", ""], ids=["thread", "without"])
@pytest.mark.usefixtures("processes")
def test_a_process_ends_soon_although_its_reader_stalls(start: str, log: Log) -> None:
    log.fill()
    ended = run(f"{start}\nlogging.info('a line')\n", stdout=log.stream.fileno())
    with within(FLUSH_SECONDS + 10):
        assert ended.wait(30) == 0


FORK = """
for _ in range(100):
    logging.info("x" * 999)  # more than the pipe holds
if not os.fork():
    logging.info("child")
    sys.exit()
os.wait()
logging.info("parent")
"""


@pytest.mark.usefixtures("processes")
def test_a_child_does_not_write_its_parents_lines_again(log: Log) -> None:
    forked = run(FORK, stdout=log.stream.fileno())
    lines = log.lines(102)
    assert forked.wait(30) == 0
    assert sorted(lines) == sorted(["child", *["x" * 999] * 100, "parent"])
    assert not select.select([log.reader], [], [], 0)[0]
