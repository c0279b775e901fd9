"""How far the outputs of a compressed model are from those of the dense one, without labels."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.batches import tensors_of
from spectrim.losses import Loss, scores_of
from spectrim.tools.precision import wide


def distance(loss: Loss, outputs: Any, wanted: Any, targets: Any, temperature: float = 1.0) -> tuple[Tensor, str]:
    """Return how far ``outputs`` are from ``wanted``, those of the dense model, and the name of this measure.

    Class scores, as ``losses.scores_of`` finds them: the mean KL divergence ``KL(p_dense || p)`` of the predictions, in
    nats. Other outputs: ``E ||y - y_dense||^2 / E ||y_dense||^2``, added up over all floating-point tensors. It is NaN
    where there are none, or where they differ in shape, as the boxes that a detector finds do. Targets tell only which
    of the two it is, and which tokens of a text are predicted.

    ``temperature``: ``T^2 KL`` of the class scores over ``T`` is returned (Hinton et al., 1503.02531).
    """
    scores, goal = (scores_of(loss, own, targets) for own in (outputs, wanted))
    if scores is not None and goal is not None:
        found, wished = ((own / temperature).log_softmax(-1) for own in (scores, goal))
        softened = F.kl_div(found, wished, reduction="batchmean", log_target=True)
        return temperature**2 * softened, "KL divergence (nats)"
    ours, theirs = ([y for y in tensors_of(own) if y.is_floating_point() and y.numel()] for own in (outputs, wanted))
    measure = "relative squared error"
    if not theirs:
        return torch.tensor(math.nan), f"{measure} of outputs without a floating-point tensor"
    if [y.shape for y in ours] != [z.shape for z in theirs]:
        return torch.tensor(math.nan), f"{measure} of outputs that differ in shape"
    return torch.stack([relative_error(y, z) for y, z in zip(ours, theirs, strict=True)]).sum(), measure


def relative_error(y: Tensor, wanted: Tensor) -> Tensor:
    """Return ``||y - wanted||^2 / ||wanted||^2``; the first term over the least number where ``wanted`` is 0."""
    y, wanted = wide(y), wide(wanted)
    tiny = torch.finfo(wanted.dtype).tiny
    return (y - wanted).square().sum() / wanted.square().sum().clamp_min(tiny)
