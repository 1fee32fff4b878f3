"""HTTP: the one place, besides the commands, that knows Flask."""
