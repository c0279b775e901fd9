"""Compute the bounds of S2 on how far a truncation can move the outputs and the loss of a network."""
