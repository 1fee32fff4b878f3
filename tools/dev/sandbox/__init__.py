"""The sandbox: mock providers, and one page that shows what the service does with them."""

from tools.dev.sandbox.server import Sandbox

__all__ = ["Sandbox"]
