"""Layers of a model found, replaced, and their cost counted or timed."""
