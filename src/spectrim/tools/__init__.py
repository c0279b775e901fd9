"""Plumbing that knows nothing of compression."""
