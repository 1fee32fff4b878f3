"""JSON logs: one object per line on stdout, free of secrets, texts and whole addresses.

Each event logs a fixed message, and allow-listed fields through `extra`. This module adds the
fields that all lines share. It leaves out the texts of exceptions: a library's may quote a URL, a
header or a body.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from pythonjsonlogger.core import LogData
from pythonjsonlogger.json import JsonEncoder, JsonFormatter

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

# Libraries whose log lines quote hosts, paths or SQL. The service logs the same events itself.
_QUIET_LIBRARIES = ("urllib3", "requests", "psycopg", "yoyo", "werkzeug")

_MOST_CAUSES = 20

# Minimum seconds between two lines about the same event: one per request would flood the log.
LOG_INTERVAL = 1.0

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class _Formatter(JsonFormatter):
    """Writes the fields in the order people read them: time, level, logger, message."""

    def __init__(self, app_name: str) -> None:
        encode = JsonEncoder().encode  # the library would make one for each line
        super().__init__(json_serializer=lambda line, **_: encode(line))
        self._app_name = app_name

    def add_fields(
        self, log_data: LogData, record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        moment = datetime.fromtimestamp(record.created, UTC)
        log_data["timestamp"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = record.message
        log_data["app"] = self._app_name
        log_data["request_id"] = request_id.get()
        super().add_fields(log_data, record, message_dict)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        return frames(ei[1]) if ei[1] else ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and its chain of causes, at most `_MOST_CAUSES`: the chain may be a circle."""
    for _ in range(_MOST_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def frames(error: BaseException) -> str:
    """Return class and frames of `error` and its causes, oldest first, without their texts."""
    return "\n".join(reversed([_frames_of_one(link) for link in causes(error)]))


def _frames_of_one(error: BaseException) -> str:
    lines = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
    return f"{type(error).__module__}.{type(error).__qualname__}\n{lines}".rstrip()


def log_dead_thread(ended: threading.ExceptHookArgs) -> None:
    """Log the exception that ended a thread; a `threading.excepthook` that leaves out its text."""
    if ended.exc_value:
        name = ended.thread.name if ended.thread else None
        logging.getLogger(__name__).error(
            "a thread has died", exc_info=ended.exc_value, extra={"dead_thread": name}
        )


class OncePerSecond:
    """Limits the log lines about a frequent event to one a second, with a count.

    The last count appears with the next log line, however late. Shared: the times, guarded by
    `_lock`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._again_at: dict[Hashable, float] = {}
        self._times: dict[Hashable, int] = {}

    def times(self, key: Hashable) -> int:
        """Count an event for `key`; return the count since its last line, 0 to log nothing."""
        now = self._clock()
        with self._lock:
            times = self._times[key] = self._times.get(key, 0) + 1
            if now < self._again_at.get(key, now):
                return 0
            self._again_at[key], self._times[key] = now + LOG_INTERVAL, 0
        return times


def mask_address(to: str) -> str:
    """Return an address that support can recognise and nobody can write to: `b***@example.com`."""
    local, _, domain = to.rpartition("@")
    return f"{local[:1]}***@{domain}"


def configure(app_name: str, level: str, handler: logging.Handler) -> None:
    """Write the lines of all loggers of this process to `handler` as JSON; safe to call again."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # not shown
    handler.setFormatter(_Formatter(app_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
