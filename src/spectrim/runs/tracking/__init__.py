"""Report runs while they happen, to Weights & Biases, TensorBoard, MLflow, csv files, or to nobody."""
