"""Draw the random directions of the Fisher information, the same in one process and in several that share a split."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, to_device
from spectrim.losses import Loss, TokenLoss, direction, fisher_direction, logits_of, scores_of
from spectrim.statistics.batch_loss import batch_weight
from spectrim.statistics.objective import Objective
from spectrim.statistics.row_weights import row_weights
from spectrim.tools.normals import Normals
from spectrim.tools.token_entropy import BLOCK


class Direction(NamedTuple):
    """A random direction of the scores of a batch, from which a backward pass starts.

    ``values``: the scores, or the logits of a language model. The direction is 0 at those that predict nothing.
    ``gradient``: the direction, float32 of the shape of ``values``. Each row is scaled by the root of its weight in the
        loss over the mean weight of a prediction.
    ``predictions``: weight of the batch in the mean over a split.
    """

    values: Tensor
    gradient: Tensor
    predictions: int


def random_direction(
    loss: Loss, outputs: Any, targets: Any, generator: torch.Generator, top: int | None = None
) -> Direction | None:
    """Return a ``fisher_direction`` of the scores of a batch; None where the outputs are no scores.

    ``top``: only so many of the highest scores of each prediction have a direction; None: all.
    """
    if isinstance(loss, TokenLoss):
        return _of_tokens(loss, logits_of(outputs), targets, generator, top)
    scores = scores_of(loss, outputs, targets)
    if scores is not None and top is not None:
        scores = scores.topk(min(top, scores.shape[1])).values
    if scores is None:
        return None
    gradient, weights = fisher_direction(scores, generator), row_weights(loss, outputs, targets)
    if weights is None:
        return Direction(scores, gradient, len(scores))
    predictions = batch_weight(loss, targets)
    return Direction(scores, gradient.mul_((weights * predictions).sqrt().to(gradient).unsqueeze(1)), predictions)


def _of_tokens(
    loss: TokenLoss, logits_NTV: Tensor, targets: Tensor, generator: torch.Generator, top: int | None
) -> Direction:
    """Return ``random_direction`` of a language model, a block of rows at a time.

    The logits are the largest tensor of a small decoder, and a direction is made of several such.
    """
    rows, words = loss.predicted(targets).nonzero().to(logits_NTV.device), logits_NTV.shape[-1]
    drawn = words if top is None else min(top, words)
    normals = Normals(len(rows) * drawn, generator)
    gradient = torch.zeros(logits_NTV.shape, dtype=torch.float32, device=logits_NTV.device)
    parts = min(-(-len(rows) * words // BLOCK), len(rows) // 2)  # torch may add up one row alone in another order
    for n, t in (part.T for part in rows.tensor_split(max(1, parts))):
        scores = logits_NTV.detach()[n, t].float()
        if top is None:
            gradient[n, t] = direction(scores, normals)
        else:
            highest, places = scores.topk(drawn)
            gradient[n, t] = torch.zeros_like(scores).scatter_(-1, places, direction(highest, normals))
    return Direction(logits_NTV, gradient, len(rows))


def generator_of(
    model: nn.Module, objective: Objective, samples: int, seed: int, top: int | None = None
) -> tuple[Objective, torch.Generator]:
    """Return an objective with the calibration batches, and the generator that draws the directions of their scores.

    Of several processes each has the generator that one process would have when it comes to these batches. To know how
    much that one has drawn, each process takes one pass more over its batches. These are then held in memory.

    ``samples``: number of calibration samples to read, in whole batches.
    ``seed``: of the generator.
    ``top``: number of scores of each prediction that have a direction; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    if objective.processes("calibration").size > 1:
        objective = objective.held("calibration", samples)
        for rows, columns in _shapes_before(model, objective):
            drawn = columns if top is None else min(top, columns)
            torch.randn(rows, drawn, generator=generator, dtype=torch.float32)
    return objective, generator


def _shapes_before(model: nn.Module, objective: Objective) -> list[tuple[int, int]]:
    """Return the shape of the scores of each batch that processes of lower ranks hold, in the order of one process."""
    device = device_of(model)
    shapes: list[tuple[int, ...]] = []
    with evaluating(model), torch.no_grad():
        for inputs, targets in objective.batches("calibration"):
            outputs = forward(model, to_device(inputs, device))
            scores = scores_of(objective.loss, outputs, to_device(targets, device))
            shapes.append((0, 0) if scores is None else tuple(scores.shape))
    found = objective.processes("calibration").before(torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2))
    return [(rows, columns) for rows, columns in found.tolist() if rows]
