"""Gradients of the mean loss of a split by the weights of layers."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, to_device
from spectrim.losses import Loss
from spectrim.statistics.backward import gradients_at
from spectrim.statistics.batch_loss import batch_weight, finite_loss
from spectrim.statistics.processes import ALONE, Processes
from spectrim.statistics.split_reader import Batch, require_samples
from spectrim.tools.precision import wide
from spectrim.tools.trainable import alone_trainable


def mean_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: Loss,
    batches: Iterable[Batch],
    split: str,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss by each weight, with ``model`` in eval mode. Every ``.grad`` is unchanged.

    A batch whose loss does not depend on a weight counts zero there, such as one that does not reach an expert. A
    weight is left out of the result if the loss of no batch depends on it.
    Raises ``UserError`` where the loss is not finite or the split is empty.
    """
    device, seen, reached = device_of(model), 0, set[str]()
    sums = {name: torch.zeros_like(wide(weight)) for name, weight in weights.items()}
    with evaluating(model), torch.enable_grad(), alone_trainable(model, weights.values()):
        for inputs, targets in batches:
            targets = to_device(targets, device)
            value = finite_loss(loss, forward(model, to_device(inputs, device)), targets, split)
            count = batch_weight(loss, targets, inputs)
            for name, gradient in _of_batch(value, weights).items():
                sums[name].add_(gradient, alpha=count)
                reached.add(name)
            seen += count
    seen = int(processes.add_up(torch.tensor(seen)))
    require_samples(seen, split)
    return {name: processes.add_up(sums[name]).div_(seen) for name in processes.in_any(reached, sums)}


def _of_batch(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of the loss of one batch by each weight that it depends on."""
    if not loss.requires_grad:  # it depends on none of them
        return {}
    found = gradients_at(loss, list(weights.values()))
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}
