"""What several algorithms share: the workbench, budgets, greedy removal, training inside a selection."""
