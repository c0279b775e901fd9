"""The loss of one batch, and its weight in the mean over a split."""

from typing import Any

import torch
from torch import Tensor

from spectrim.batches import Inputs, target_count
from spectrim.errors import MissingInput, UserError
from spectrim.losses import IGNORED, Loss, TokenLoss, loss_of


def batch_weight(loss: Loss, targets: Any, inputs: Inputs = None) -> int:
    """Return the weight of a batch in the split's mean: its number of samples, or of predicted tokens."""
    return loss.count(targets) if isinstance(loss, TokenLoss) else target_count(targets, inputs)


def finite_loss(loss: Loss, outputs: Any, targets: Any, split: str) -> Tensor:
    """Return the mean loss of a batch.

    Raises ``UserError`` where it fails on these targets or is not finite, and ``MissingInput`` where it fails without.
    """
    try:
        value = loss_of(loss, outputs, targets)
    except (UserError, AttributeError):  # a loss may ask None for what a tensor has
        if targets is None:
            advice = "give (inputs, targets), or mappings with labels"
            raise MissingInput(f"the {split} batches have no targets, which the loss needs; {advice}") from None
        raise
    if not torch.isfinite(value) and isinstance(loss, TokenLoss) and not loss.count(targets):
        raise UserError(
            f"a batch of the {split} split has no token to predict: all of its labels are {IGNORED}, or it holds one "
            "token a sequence; leave it out"
        )
    if not torch.isfinite(value):
        raise UserError(f"the loss on the {split} split is {value.item()}; check the model's weights and the inputs")
    return value
