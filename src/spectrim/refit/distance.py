"""How far the outputs of a compressed model are from those of the dense one, without labels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.batches import tensors_of
from spectrim.losses import Loss, scores_of


def distance(loss: Loss, outputs: Any, wanted: Any, targets: Any) -> tuple[Tensor, str]:
    """Return how far ``outputs`` are from ``wanted``, those of the dense model, and the name of this measure.

    Class scores, as ``losses.scores_of`` finds them: the mean KL divergence ``KL(p_dense || p)`` of the predictions, in
    nats. Other outputs: ``E ||y - y_dense||^2 / E ||y_dense||^2``, added up over all floating-point tensors. Targets
    tell only which of the two it is, and which tokens of a text are predicted.
    """
    scores, goal = (scores_of(loss, own, targets) for own in (outputs, wanted))
    if scores is not None and goal is not None:
        logs = scores.log_softmax(-1), goal.log_softmax(-1)
        return F.kl_div(*logs, reduction="batchmean", log_target=True), "KL divergence (nats)"
    pairs = zip(tensors_of(outputs), tensors_of(wanted), strict=True)
    parts = [relative_error(y, z) for y, z in pairs if z.is_floating_point() and z.numel()]
    return torch.stack(parts).sum(), "relative squared error"


def relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """Return ``||y - wanted||^2 / ||wanted||^2``; the first term over the least number where ``wanted`` is 0."""
    tiny = torch.finfo(wanted.dtype).tiny
    return (y - wanted).square().sum() / wanted.square().sum().clamp_min(tiny)
