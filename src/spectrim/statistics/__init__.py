"""What is measured of a model on data: losses, gradients, second moments, Fisher information."""
