"""The change of the loss between two models on the same samples, and its standard error."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, one_sample, target_count, to_device
from spectrim.errors import UserError
from spectrim.statistics.batch_loss import batch_weight, finite_loss
from spectrim.statistics.objective import Objective


class Losses(NamedTuple):
    """Mean loss and weight of each sample, float64 of shape (N,). A weight is 1, or a number of predicted tokens."""

    values: Tensor
    weights: Tensor


class Change(NamedTuple):
    """The mean change of the loss, as two results of ``Objective.evaluate`` differ, and its standard error."""

    mean: float
    error: float


def losses(objective: Objective, model: nn.Module, split: str) -> Losses:
    """Return the loss of each sample of ``split``, with ``model`` in eval mode.

    Raises ``UserError`` for fewer than two samples, which have no standard error.
    """
    device, values, weights = device_of(model), list[float](), list[int]()
    with evaluating(model), torch.no_grad():
        for inputs, targets in objective.counted(split):
            outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
            count = target_count(targets, inputs)
            for index in range(count):
                wanted = one_sample(targets, index, count)
                values.append(finite_loss(objective.loss, one_sample(outputs, index, count), wanted, split).item())
                weights.append(batch_weight(objective.loss, wanted))
    gather = objective.processes(split).gather
    found = gather(torch.tensor(values, dtype=torch.float64)), gather(torch.tensor(weights, dtype=torch.float64))
    if len(found[0]) < 2:
        raise UserError(
            f"the {split} split has {len(found[0])} samples; a change of the loss needs at least 2 to be certain"
        )
    return Losses(*found)


def change(before: Losses, after: Losses) -> Change:
    """Return the change from ``before`` to ``after``, the losses of two models on the same samples.

    Pairing by sample removes the variance that both models share.
    """
    weights, steps = before.weights, after.values - before.values
    mean = (weights * steps).sum() / weights.sum()
    spread = (weights * (steps - mean)).square().sum() * len(steps) / (len(steps) - 1)
    return Change(float(mean), float(spread.sqrt() / weights.sum()))
