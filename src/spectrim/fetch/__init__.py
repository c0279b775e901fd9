"""Data and weights from package registries and hubs, kept in a cache."""
