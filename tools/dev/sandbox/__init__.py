"""The sandbox: mock providers, and one page that shows how the service uses them."""

from tools.dev.sandbox.server import Sandbox

__all__ = ["Sandbox"]
