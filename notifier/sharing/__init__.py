"""State that the workers of one master share: metrics, and the providers for a new worker."""
