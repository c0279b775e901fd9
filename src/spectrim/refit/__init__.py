"""Fit factors to the outputs of the dense layers, without labels."""
