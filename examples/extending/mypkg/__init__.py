"""Parts of a run that spectrim does not have."""
