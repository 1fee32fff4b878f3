"""`python -m tools.dev.sandbox --service URL "email 1=9090" …` serves until SIGINT or SIGTERM."""

import argparse
import re
import signal

from tools.dev.sandbox.server import Sandbox

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def main() -> None:
    """Serve the page and the providers of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.dev.sandbox")
    parser.add_argument("--service", required=True, metavar="URL", help="the service's base URL")
    parser.add_argument("--bind", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("providers", nargs="+", type=_parse_provider, metavar="NAME=PORT")
    given = parser.parse_args()
    # Blocked before any thread starts, so that sigwait gets them, in whichever thread they arrive.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        sandbox = Sandbox(given.providers, given.service, given.bind)
    except OSError as error:
        parser.exit(1, f"{error.strerror}\n")
    with sandbox:
        print(f"sandbox: {sandbox.url}", flush=True)
        for provider in sandbox.providers:
            print(f"{provider.name}: {provider.url}", flush=True)
        signal.sigwait(STOP_SIGNALS)


def _parse_provider(text: str) -> tuple[str, int]:
    name, _, port = text.rpartition("=")
    if not name.strip() or not re.fullmatch("[0-9]{1,5}", port) or int(port) not in range(65536):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PORT, such as 'email 1=9090'")
    return name.strip(), int(port)


if __name__ == "__main__":
    main()
