"""Find and replace the layers of a model, and count or time what they cost."""
