"""Compute Theorems 1 to 3 of S2 from singular values, Lipschitz constants and norms.

The network is a chain ``X_l = a_l(W_l X_{l-1} + b_l)`` for l = 1..L. Each a_l is rho_l-Lipschitz with a_l(0) = 0. In
the truncated network W_l has rank k_l; the biases are the same. Let e_l be the distance between the outputs of layer l
of both networks, and N_{l-1} a bound on ||X_{l-1}|| in either of them. Then

    e_l <= rho_l (sigma_1^l e_{l-1} + sigma_{k+1}^l N_{l-1}),        N_l = rho_l (sigma_1^l N_{l-1} + ||b_l||),

The output therefore moves by at most the sum over l of ``C_l sigma_{k+1}^l / sigma_1^l``. The sensitivity of the
output to a relative truncation of layer l is ``C_l = N_{l-1} * product over j >= l of rho_j sigma_1^j``.

Without biases every C_l is ||X_0|| times the product over all layers, which is Theorem 1. S2 has no biases. They cancel
in e_l but not in N_l, because the truncated part of a layer also acts on the biases before it. With biases the printed
bound does not hold; the bound above does.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from spectrim.errors import UserError

# The gradient of cross-entropy by the logits is softmax minus one-hot. Its 2-norm is below sqrt(2), and no smaller
# constant bounds it. The constant of the distance ||z - y||_2 is 1. A squared error has none.
LOSS_LIPSCHITZ = {"cross_entropy": math.sqrt(2), "distance": 1.0}


class Stage(NamedTuple):
    """Hold one layer, and what follows it up to the next layer.

    ``S_R``: descending; S_R[k] bounds the norm of the part that rank k drops, and S_R[0] that of the whole map. These
    are the singular values, times the gain of a convolution.
    ``rho``: Lipschitz constant of the activation and pooling after the layer.
    ``bias``: 2-norm of the bias over all positions to which it is added.
    """

    name: str
    S_R: Tensor
    rho: float
    bias: float = 0.0


def sensitivities(stages: Sequence[Stage], input_norm: float) -> list[float]:
    """Return ``C_l`` of each stage, for inputs of 2-norm at most ``input_norm``."""
    norms = [input_norm]
    for stage in stages:
        norms.append(stage.rho * (float(stage.S_R[0]) * norms[-1] + stage.bias))
    after, found = 1.0, []
    for stage, norm in zip(reversed(stages), reversed(norms[:-1]), strict=True):
        after *= stage.rho * float(stage.S_R[0])
        found.append(after * norm)
    return found[::-1]


def output_bound(stages: Sequence[Stage], ranks: Sequence[int | None], input_norm: float) -> float:
    """Bound the 2-norm by which an output moves if layer l is truncated to ``ranks[l]`` (Theorem 1, with biases).

    ``ranks``: None, or a rank that is not below the full one, leaves a layer unchanged.
    Raises ``UserError`` for a rank below 0.
    """
    if any(rank is not None and rank < 0 for rank in ranks):
        raise UserError(f"a rank is at least 0, got {list(ranks)}")
    total = 0.0
    for stage, rank, felt in zip(stages, ranks, sensitivities(stages, input_norm), strict=True):
        if rank is not None and rank < len(stage.S_R) and stage.S_R[0] > 0:
            total += felt * float(stage.S_R[rank] / stage.S_R[0])
    return total


def delta(
    stages: Sequence[Stage], epsilon: float, input_norm: float, loss: Literal["cross_entropy", "distance"]
) -> float:
    """Return the threshold on ``sigma_{k+1} / sigma_1`` below which the mean loss moves by less than ``epsilon``.

    This is Theorem 2 (cross-entropy) or 3 (distance): ``epsilon / (K * sum of C_l)``, where K is the Lipschitz constant
    of the loss. Without biases the sum is ``B L * product of rho_l sigma_1^l`` of S2. The threshold is infinite for a
    network whose output is the same for every input.

    ``input_norm``: bound on the 2-norm of the inputs over which the mean is taken (B of S2).
    Raises ``UserError`` where epsilon is not above 0.
    """
    if not epsilon > 0:
        raise UserError(f"epsilon must be above 0, got {epsilon}")
    felt = LOSS_LIPSCHITZ[loss] * sum(sensitivities(stages, input_norm))
    return epsilon / felt if felt > 0 else math.inf
