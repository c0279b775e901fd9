"""A run: its configuration, its task (model and data), and who is told of it."""
