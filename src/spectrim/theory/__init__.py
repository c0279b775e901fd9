"""The bounds of S2: how far a truncation can move a network's outputs and its loss."""
