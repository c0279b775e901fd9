"""Training: the recipe, the loop, its state on disk, layers trained as U, S and Vh."""
