"""Records of runs and their provenance. This package does not import torch."""
