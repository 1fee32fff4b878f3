"""Tools that developers run beside the service; the image does not contain them."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
