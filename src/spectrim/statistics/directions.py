"""Draw the random directions of the Fisher information, the same in one process and in several that share a split."""

import torch
from torch import nn

from spectrim.batches import device_of, evaluating, forward, to_device
from spectrim.losses import scores_of
from spectrim.statistics.objective import Objective


def generator_of(
    model: nn.Module, objective: Objective, samples: int, split: str, seed: int, top: int | None = None
) -> tuple[Objective, torch.Generator]:
    """Return an objective with the batches to read, and the generator that draws the directions of their scores.

    Of several processes each has the generator that one process would have when it comes to these batches. To know how
    much that one has drawn, each process takes one pass more over its batches. These are then held in memory.

    ``samples``: number of samples to read, in whole batches.
    ``top``: number of scores of each prediction that have a direction; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    if objective.processes(split).size > 1:
        objective = objective.held(split, samples)
        for rows, columns in _shapes_before(model, objective, split):
            torch.randn(rows, columns if top is None else min(top, columns), generator=generator)
    return objective, generator


def _shapes_before(model: nn.Module, objective: Objective, split: str) -> list[tuple[int, int]]:
    """Return the shape of the scores of each batch that processes of lower ranks hold, in the order of one process."""
    device = device_of(model)
    shapes: list[tuple[int, ...]] = []
    with evaluating(model), torch.no_grad():
        for inputs, targets in objective.batches(split):
            outputs = forward(model, to_device(inputs, device))
            scores = scores_of(objective.loss, outputs, to_device(targets, device))
            shapes.append((0, 0) if scores is None else tuple(scores.shape))
    found = objective.processes(split).before(torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2))
    return [(rows, columns) for rows, columns in found.tolist() if rows]
