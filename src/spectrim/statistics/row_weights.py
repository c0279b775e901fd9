"""How much each row of class scores counts in the loss of its batch.

A loss may ignore targets, as of padding or of nodes that nobody labelled, or weigh classes. The Fisher information of
``sum_i w_i l_i`` with cross-entropies l_i is ``sum_i w_i J_i^T (diag(p_i) - p_i p_i^T) J_i``. So a row needs its w_i.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.batches import with_tensors
from spectrim.losses import Loss, SpanLoss, are_scores, have_scores, ignored_class, logits_of, taken_by

EQUAL = 1e-3  # weights that differ by so small a share are equal: rounding


class Answers(NamedTuple):
    """Number of correct predictions, and number of predictions that the loss reads."""

    right: int
    total: int


def row_weights(loss: Loss, outputs: Any, targets: Any) -> Tensor | None:
    """Return the weight of each row of class scores in the loss of the batch; None where all rows count alike.

    Those of a loss that torch does not define are read from its gradient where all scores are 0: there a row's
    cross-entropy has a gradient that depends on its weight alone.

    Shape (N,), float64, of sum 1.
    """
    if not are_scores(outputs, targets):
        return None
    if (ignored := ignored_class(loss)) is None:
        return _normalised(_gradient_sizes(loss, outputs, targets))
    weights = (targets != ignored).double()
    of_classes = getattr(loss, "weight", None)
    if of_classes is not None:
        weights *= of_classes.detach().to(weights)[targets.where(targets != ignored, 0)]
    return _normalised(weights)


def answers(loss: Loss, outputs: Any, targets: Any) -> Answers | None:
    """Return how many samples are classified or answered correctly; None if the outputs are not class scores."""
    if isinstance(loss, SpanLoss):
        return Answers(loss.right(outputs, targets), len(targets))
    if not are_scores(outputs, targets) or not have_scores(loss, outputs, targets):
        return None
    correct, weights = logits_of(outputs).argmax(1) == targets, row_weights(loss, outputs, targets)
    read = torch.ones_like(correct) if weights is None else weights > 0
    return Answers(int((correct & read).sum()), int(read.sum()))


def _normalised(weights: Tensor | None) -> Tensor | None:
    """Return weights of sum 1; None where they are equal or say nothing."""
    if weights is None or not len(weights) or not bool(weights.isfinite().all()) or not bool(weights.any()):
        return None
    weights = weights / weights.sum()
    return None if bool(((weights * len(weights) - 1).abs() < EQUAL).all()) else weights


@torch.enable_grad()
def _gradient_sizes(loss: Loss, outputs: Any, targets: Tensor) -> Tensor | None:
    """Return the norm of the loss's gradient by each row of scores where all of them are 0."""
    scores = logits_of(outputs)
    probe = torch.zeros_like(scores, dtype=torch.float32, requires_grad=True)
    try:
        given = with_tensors(outputs, lambda own: probe if own is scores else own.detach())
        value = loss(taken_by(loss, given), targets.clone())
        (gradient,) = torch.autograd.grad(value, probe)
    except (RuntimeError, ValueError, IndexError, TypeError):  # it has no gradient, or fails on such scores
        return None
    return gradient.double().norm(dim=1)
