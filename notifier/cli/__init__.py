"""The operators' commands: `flask --app notifier.app COMMAND`."""
