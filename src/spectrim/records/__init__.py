"""Records of runs and where their numbers come from. Nothing here needs torch."""
