"""Measures the CPU of single steps in the checkout that is on Python's path.

    PYTHONPATH=FOLDER python -P timing.py STEP    # prints microseconds on standard error

It imports nothing of this package: it runs in another checkout as well.
"""

import logging
import sys
import time
from collections.abc import Callable

from marshmallow import Schema

LINES, APART = 200, 0.0002  # in a round; seconds between them
LAST = 0.1  # seconds for another thread to write the last lines
BODIES, ROUNDS = 1_000, 10
DOMAINS = 20

# A `request` line as the service writes one for a buyer.
FIELDS = {
    "method": "POST",
    "route": "/api/v1.0/recipient/<recipient>/notify",
    "status": 200,
    "duration_ms": 3.2,
    "recipient": "buyer",
    "channels": [{"channel": "Email", "outcome": "delivered", "provider": "a provider"}],
    "to": "b***@example.com",
}


def log_line() -> float:
    """Measure a line of the log until it is written, over all threads; none waits for another."""
    _configure()
    log = logging.getLogger("notifier.web.requests")

    def lines() -> None:
        for _ in range(LINES):
            log.info("request", extra=FIELDS)
            time.sleep(APART)
        time.sleep(LAST)

    def pauses() -> None:
        for _ in range(LINES):
            time.sleep(APART)
        time.sleep(LAST)

    return (min(map(_cpu, [lines] * ROUNDS)) - min(map(_cpu, [pauses] * ROUNDS))) / LINES


def _configure() -> None:
    from notifier import logs  # noqa: PLC0415

    try:
        from notifier.serving.log_queue import QueueHandler  # noqa: PLC0415
    except ImportError:  # an older checkout, which writes each line at once
        logs.configure("notifier", "INFO")  # type: ignore[call-arg]
    else:
        handler = QueueHandler(sys.stdout)
        logs.configure("notifier", "INFO", handler)
        handler.start(lambda _: None)


def known_domain() -> float:
    """Measure the validation of a body whose domain was seen before."""
    return _bodies(lambda _, number: f"someone{number}@shop{number % DOMAINS}.example.com")


def new_domain() -> float:
    """Measure the validation of a body whose domain is new."""
    return _bodies(lambda turn, number: f"someone{number}@shop{number}.round{turn}.example.com")


def _schema() -> Schema:
    try:
        from notifier.addresses import Addresses  # noqa: PLC0415
        from notifier.web.body import message_schema  # noqa: PLC0415
    except ImportError:  # an older checkout
        from notifier.web.body import NotificationSchema  # type: ignore[attr-defined]  # noqa: PLC0415

        return NotificationSchema()  # type: ignore[no-any-return]
    return message_schema(Addresses(allow_local=False))


def _bodies(address: Callable[[int, int], str]) -> float:
    schema = _schema()

    def validate(turn: int) -> float:
        bodies = [
            {"to": address(turn, number), "title": "Sold", "message": "Your bicycle is sold."}
            for number in range(BODIES)
        ]
        return _cpu(lambda: [schema.load(body) for body in bodies]) / BODIES

    return min(validate(turn) for turn in range(ROUNDS))


def _cpu(work: Callable[[], object]) -> float:
    """Return the CPU seconds of all threads of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


STEPS = {"log line": log_line, "known domain": known_domain, "new domain": new_domain}

if __name__ == "__main__":
    print(f"{1e6 * STEPS[sys.argv[1]]():.1f}", file=sys.stderr)
