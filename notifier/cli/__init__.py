"""What operators run: `flask --app notifier.app COMMAND`."""
