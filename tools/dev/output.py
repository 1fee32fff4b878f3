"""Standard output of `make run`: its own lines and the service's log.

A paused terminal or an unread pipe blocks its writer. So a thread does nothing but write, and
neither the service nor its stop waits for that thread.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import IO

from tools.dev import readable
from tools.dev.readable import Entry

# Lines kept while the terminal is paused. Beyond that, new lines replace the oldest ones.
MOST_WAITING = 10_000

# Seconds without progress after which `close` drops the rest.
PATIENCE = 2.0

# Seconds that the log may take to end after the service has ended.
LAST_LINES = 5.0


class Output:
    """Writes to a file descriptor in a daemon thread.

    Shared with that thread: the waiting lines and the counts, guarded by `_changed`.
    """

    def __init__(self, descriptor: int) -> None:
        self.is_terminal = os.isatty(descriptor)
        self.colour = (
            self.is_terminal
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") not in (None, "", "dumb")
        )
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._dropped = 0
        self._written = 0
        self._is_closing = False
        self._writer = threading.Thread(target=self._write, name="output", daemon=True)
        self._writer.start()

    def say(self, text: str) -> None:
        """Queue a line."""
        self.put(f"{text}\n".encode())

    def put(self, data: bytes) -> None:
        """Queue bytes; return at once."""
        with self._changed:
            self._dropped += len(self._waiting) == MOST_WAITING
            self._waiting.append(data)
            self._changed.notify()

    def close(self) -> None:
        """Wait until all is written; give up after `PATIENCE` seconds without progress."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        before = -1
        while self._writer.is_alive() and self._written != before:
            before = self._written
            self._writer.join(PATIENCE)

    def _write(self) -> None:
        """Write until `close`. Once the terminal is gone, drop all that comes."""
        is_gone = False
        while data := self._take():
            try:
                while data and not is_gone:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                is_gone = True
            self._written += 1

    def _take(self) -> bytes:
        """Return the next bytes to write; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                return f"({dropped} lines left out: the terminal was too slow)\n".encode()
            return self._waiting.popleft() if self._waiting else b""


class Log:
    """Shows the service's log and passes each of its entries on.

    A terminal gets readable lines; a pipe or a file gets the service's own bytes.
    """

    def __init__(self, output: Output, heard: Callable[[Entry], None]) -> None:
        self._output = output
        self._heard = heard
        self._reader: threading.Thread | None = None

    def follow(self, source: IO[bytes]) -> None:
        """Start the reader; call once."""
        self._reader = threading.Thread(target=self._read, args=(source,), name="log", daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Wait until the last line has been read."""
        if self._reader:
            self._reader.join(LAST_LINES)

    def _read(self, source: IO[bytes]) -> None:
        for line in source:
            self._output.put(self._shown(line))

    def _shown(self, line: bytes) -> bytes:
        """Pass the line's entry on, and return the line as the output gets it."""
        try:
            entry = readable.parse(line)
            if entry is None:
                return line
            self._heard(entry)
            text = readable.text(entry, colour=self._output.colour)
        except Exception:  # noqa: BLE001 an entry of any form: if the reader ended, the service would block
            return line
        return f"{text}\n".encode() if self._output.is_terminal else line
