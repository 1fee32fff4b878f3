"""What developers run beside the service; the image never contains it."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
