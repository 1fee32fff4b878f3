"""The system's Chromium or Chrome, headless, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser


NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def executable() -> str | None:
    """Return the path of a browser, if the system has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> "Iterator[Browser]":
    """Run a browser with a new profile; root must run it without its own sandbox."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 it takes a moment to import

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=executable(), chromium_sandbox=os.geteuid() != 0, args=QUIET
        )
        try:
            yield running
        finally:
            running.close()
