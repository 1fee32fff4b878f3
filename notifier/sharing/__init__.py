"""What the workers of one master share: files of metrics, and the providers for a new worker."""
