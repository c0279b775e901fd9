"""By how much one model's loss lies above another's on the same samples, and how certain that is."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, one_sample, sample_count, to_device
from spectrim.errors import UserError
from spectrim.losses import logits_of
from spectrim.statistics.batch_loss import batch_weight, finite_loss
from spectrim.statistics.objective import Objective


class Losses(NamedTuple):
    """Of each sample its mean loss and what it counts for: 1, or its tokens to be predicted. float64, shape (N,)."""

    values: Tensor
    weights: Tensor


class Change(NamedTuple):
    """The mean change of the loss, as two of ``Objective.evaluate`` differ, and the standard error of that mean."""

    mean: float
    error: float


def losses(objective: Objective, model: nn.Module, split: str) -> Losses:
    """The loss of each sample of ``split``, the model in eval mode.

    Raises ``UserError`` for fewer than two samples: nothing then tells chance from change.
    """
    device, values, weights = device_of(model), list[float](), list[int]()
    with evaluating(model), torch.inference_mode():
        for inputs, targets in objective.counted(split):
            outputs, targets = logits_of(forward(model, to_device(inputs, device))), to_device(targets, device)
            count = sample_count(targets, inputs)
            for index in range(count):
                wanted = one_sample(targets, index, count)
                values.append(finite_loss(objective.loss, one_sample(outputs, index, count), wanted, split).item())
                weights.append(batch_weight(objective.loss, wanted))
    if len(values) < 2:
        raise UserError(
            f"the {split} set has {len(values)} samples; a change of the loss needs at least 2 to be certain"
        )
    return Losses(torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))


def change(before: Losses, after: Losses) -> Change:
    """From ``before`` to ``after``, two models on the same samples. What a sample is hard for both does not blur it."""
    weights, steps = before.weights, after.values - before.values
    mean = (weights * steps).sum() / weights.sum()
    spread = (weights * (steps - mean)).square().sum() * len(steps) / (len(steps) - 1)
    return Change(float(mean), float(spread.sqrt() / weights.sum()))
