"""The loss of one batch, and its weight in the mean over a split."""

from typing import Any

import torch
from torch import Tensor

from spectrim.batches import Inputs, target_count, with_tensors
from spectrim.errors import MissingInput, UserError, first_line
from spectrim.losses import IGNORED, Loss, TokenLoss, ignored_class, loss_of
from spectrim.statistics.mean_loss import require_mean


def batch_weight(loss: Loss, targets: Any, inputs: Inputs = None) -> int:
    """Return the weight of a batch in the split's mean: its number of samples, or of predicted tokens.

    Classes that a loss of torch ignores are no samples.
    """
    if isinstance(loss, TokenLoss):
        return loss.count(targets)
    ignored = ignored_class(loss)
    if ignored is not None and isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point():
        return int((targets != ignored).sum())
    return target_count(targets, inputs)


def has_gradient(loss: Loss, outputs: Any, targets: Any) -> bool:
    """Return whether the loss of a batch has a gradient by its outputs, as an accuracy or a count has not."""
    leaves = with_tensors(outputs, lambda own: own.detach().clone().requires_grad_(own.is_floating_point()))
    with torch.enable_grad():
        return loss_of(loss, leaves, targets).requires_grad


def finite_loss(loss: Loss, outputs: Any, targets: Any, split: str) -> Tensor:
    """Return the mean loss of a batch.

    Raises ``UserError`` where it fails on these targets, is not finite or adds up over samples, and ``MissingInput``
    where it fails without targets.
    """
    try:
        value = loss_of(loss, outputs, targets)
    except Exception as error:  # whatever a loss raises; it may ask None for what a tensor has
        if targets is None and isinstance(error, UserError | AttributeError):
            advice = "give (inputs, targets), or mappings with labels"
            raise MissingInput(f"the {split} batches have no targets, which the loss needs; {advice}") from None
        if isinstance(error, UserError):
            raise
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the loss failed on the {split} split: {problem}; give one that takes its outputs and targets"
        ) from error
    if not torch.isfinite(value) and _predicts_nothing(loss, targets):
        why = f"all of its labels are {IGNORED}, or it holds one token a sequence"
        if not isinstance(loss, TokenLoss):
            why = f"all of its targets are {ignored_class(loss)}, which the loss ignores"
        raise UserError(f"a batch of the {split} split has nothing to predict: {why}; leave it out")
    if not torch.isfinite(value):
        raise UserError(f"the loss on the {split} split is {value.item()}; check the model's weights and the inputs")
    require_mean(loss, outputs, targets)
    return value


def _predicts_nothing(loss: Loss, targets: Any) -> bool:
    if isinstance(loss, TokenLoss):
        return not loss.count(targets)
    ignored = ignored_class(loss)
    return ignored is not None and isinstance(targets, Tensor) and bool((targets == ignored).all())
