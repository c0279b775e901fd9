"""Measure a model on data: losses, gradients, second moments and Fisher information."""
