"""The gunicorn side: the master's hooks and the worker."""
