"""Runs a command that must not outlive the process at the other end of standard input.

    python -m tools.dev.guard COMMAND [ARG ...]

The command gets a SIGTERM when standard input ends, because its writer closed it or ended in any
way. The guard forwards SIGINT and SIGTERM to the command, and exits with its exit code.
"""

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    """Run `command` to its end and return its exit code (128 + n if signal n ended it)."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: child.send_signal(received))
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _end_with_input(child: "subprocess.Popen[bytes]") -> None:
    while os.read(sys.stdin.fileno(), 4096):  # unbuffered: no lock that an exit would trip over
        pass
    child.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
