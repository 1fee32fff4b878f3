"""Bytes to and from a provider."""
