"""What developers run beside the service; the image never contains it."""
