"""The notifier: one HTTP call reaches a buyer or a seller over every channel that is due."""

__version__ = "0.1.0"
