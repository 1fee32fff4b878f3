"""Run the chaos and print the report; the exit code is 1 if an invariant was violated."""

import argparse
import random
import sys

from tools import rig
from tools.chaos import invariants
from tools.chaos.report import report
from tools.chaos.stage import run

SECONDS = 150.0


def main() -> int:
    """Read the command line, run, and print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))  # noqa: S311
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    print(f"{parser.prog} --seed {given.seed} --seconds {given.seconds:g}\n", flush=True)
    return rig.exit_code("make chaos", lambda: _chaos(given.seed, given.seconds))


def _chaos(seed: int, seconds: float) -> int:
    seen = run(seed, seconds)
    violations = invariants.check(seen)
    print(report(seen, violations))
    return 1 if any(violations.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
