"""What a developer runs beside the service; nothing in the service imports it."""
