"""Train models: the recipe, the loop, its state on disk, and layers trained as U, S and Vh."""
