"""Run the chaos, and print what came of it; the exit code is 1 if an invariant was violated."""

import argparse
import os
import random
import signal
import sys

import psycopg
import requests

from tools import measure
from tools.chaos import invariants
from tools.chaos.report import report
from tools.chaos.stage import run
from tools.dev import postgres

SECONDS = 150.0

# Why there is nothing to report.
FAILURES = (
    measure.CannotMeasure,
    postgres.PostgresError,
    psycopg.Error,
    requests.RequestException,
    TimeoutError,
)


def main() -> int:
    """Read the command line, run, and print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    os.environ["no_proxy"] = "*"  # nothing here leaves the machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{parser.prog} --seed {given.seed} --seconds {given.seconds:g}\n", flush=True)
    try:
        seen = run(given.seed, given.seconds)
    except FAILURES as error:
        print(f"make chaos: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    violations = invariants.check(seen)
    print(report(seen, violations))
    return 1 if any(violations.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
