"""The change of the loss between two models on the same samples, and its standard error."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, one_sample, target_count, to_device
from spectrim.errors import UserError
from spectrim.losses import Loss
from spectrim.statistics.batch_loss import batch_weight, finite_loss
from spectrim.statistics.objective import Objective

ROUNDING = 1e-2  # of the loss: that of a batch in 16 bits and the mean of those of its samples agree so far


class Losses(NamedTuple):
    """Mean loss and weight of each sample, float64 of shape (N,). A weight is 1, or a number of predicted tokens.

    ``by_batch``: whether each entry is that of a batch instead.
    """

    values: Tensor
    weights: Tensor
    by_batch: bool = False


class Change(NamedTuple):
    """The mean change of the loss, as two results of ``Objective.evaluate`` differ, and its standard error."""

    mean: float
    error: float


def losses(objective: Objective, model: nn.Module, split: str, by_batch: bool | None = None) -> Losses:
    """Return the loss of each sample of ``split``, with ``model`` in eval mode.

    ``by_batch``: return that of each batch instead. By default so where the loss of a batch is not the mean of those of
        its samples, as where it compares samples with one another, or weighs classes.

    Raises ``UserError`` for fewer than two samples, or batches, which have no standard error.
    """
    device, single, whole, differ = device_of(model), list[_Weighed](), list[_Weighed](), False
    with evaluating(model), torch.no_grad():
        for inputs, targets in objective.counted(split):
            outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
            value = finite_loss(objective.loss, outputs, targets, split).item()
            whole.append((value, batch_weight(objective.loss, targets, inputs)))
            if by_batch or differ:
                continue
            try:
                own = _of_samples(objective.loss, outputs, targets, target_count(targets, inputs), split)
            except UserError:
                if by_batch is False:
                    raise
                differ = True
            else:
                differ = by_batch is None and not _agree(own, value)
                single += own
    processes = objective.processes(split)
    by_batch = bool(by_batch) or bool(processes.add_up(torch.tensor(int(differ))))
    found = processes.gather(torch.tensor(whole if by_batch else single, dtype=torch.float64).reshape(-1, 2))
    if len(found) < 2:
        units = "batches, whose loss is not the mean of those of their samples" if by_batch else "samples"
        raise UserError(
            f"the {split} split has {len(found)} {units}; a change of the loss needs at least 2 to be certain"
        )
    return Losses(found[:, 0], found[:, 1], by_batch)


_Weighed = tuple[float, int]  # a loss and its weight


def _of_samples(loss: Loss, outputs: Any, targets: Any, count: int, split: str) -> list[_Weighed]:
    """Return the loss and the weight of each of the ``count`` samples of a batch that the loss reads."""
    found = []
    for index in range(count):
        wanted = one_sample(targets, index, count)
        if weight := batch_weight(loss, wanted):
            value = finite_loss(loss, one_sample(outputs, index, count), wanted, split).item()
            found.append((value, weight))
    return found


def _agree(samples: Sequence[_Weighed], value: float) -> bool:
    """Return whether the mean of the losses of samples is ``value``, the loss of their batch, up to rounding."""
    values, weights = torch.tensor(samples, dtype=torch.float64).reshape(-1, 2).unbind(1)
    mean, size = ((weights * own).sum() / weights.sum() for own in (values, values.abs()))
    return bool((mean - value).abs() <= ROUNDING * max(float(size), abs(value)))


def change(before: Losses, after: Losses) -> Change:
    """Return the change from ``before`` to ``after``, the losses of two models on the same samples.

    Pairing by sample removes the variance that both models share.
    """
    weights, steps = before.weights, after.values - before.values
    mean = (weights * steps).sum() / weights.sum()
    spread = (weights * (steps - mean)).square().sum() * len(steps) / (len(steps) - 1)
    return Change(float(mean), float(spread.sqrt() / weights.sum()))
