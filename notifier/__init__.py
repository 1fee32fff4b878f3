"""The notifier: one HTTP call reaches a buyer or a seller over all of their channels."""

__version__ = "0.1.0"
