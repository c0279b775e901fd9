"""Theorems 1 to 3 of S2 on numbers: singular values, Lipschitz constants and norms go in, a bound comes out.

The net is a chain ``X_l = a_l(W_l X_{l-1} + b_l)``, l = 1..L, with a_l rho_l-Lipschitz and a_l(0) = 0; the truncated
one has W_l of rank k_l instead, and the same biases. With N_{l-1} a bound on ||X_{l-1}|| in either net,

    e_l <= rho_l (sigma_1^l e_{l-1} + sigma_{k+1}^l N_{l-1}),        N_l = rho_l (sigma_1^l N_{l-1} + ||b_l||),

e_l the distance of the outputs. So the output moves by at most the sum over l of C_l sigma_{k+1}^l / sigma_1^l, where
``C_l = N_{l-1} * product over j >= l of rho_j sigma_1^j`` is how strongly a relative cut of layer l can be felt.

Without biases every C_l is ||X_0|| times the product over all layers, which is Theorem 1. S2 has no biases. They cancel
in e_l but not in N_l: what is cut from a layer acts on the biases before it too, so that with biases the printed bound
does not hold, and the one above does.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from spectrim.errors import UserError

# Cross-entropy of the logits: its gradient is softmax minus one-hot, of 2-norm below sqrt(2), and no smaller constant
# does. Distance ||z - y||_2: 1. A squared error has no constant.
LOSS_LIPSCHITZ = {"cross_entropy": math.sqrt(2), "distance": 1.0}


class Stage(NamedTuple):
    """One layer and what follows it up to the next.

    ``S_R``: falling, S_R[k] bounds the norm of what rank k drops (k = 0: of the whole map); the singular values, times
    the gain of a convolution. ``rho``: Lipschitz constant of the activation and pooling behind. ``bias``: 2-norm of the
    bias as it is added, at every position.
    """

    name: str
    S_R: Tensor
    rho: float
    bias: float = 0.0


def sensitivities(stages: Sequence[Stage], input_norm: float) -> list[float]:
    """``C_l`` of every stage, for inputs of 2-norm at most ``input_norm``."""
    norms = [input_norm]
    for stage in stages:
        norms.append(stage.rho * (float(stage.S_R[0]) * norms[-1] + stage.bias))
    after, found = 1.0, []
    for stage, norm in zip(reversed(stages), reversed(norms[:-1]), strict=True):
        after *= stage.rho * float(stage.S_R[0])
        found.append(after * norm)
    return found[::-1]


def output_bound(stages: Sequence[Stage], ranks: Sequence[int | None], input_norm: float) -> float:
    """Theorem 1, with biases: no output moves further than this, in the 2-norm, when layer l is cut to ``ranks[l]``.

    None, or a rank that is not below the full one, leaves a layer as it is. Raises ``UserError`` for a rank below 0.
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
    """Theorem 2 (cross-entropy) or 3 (distance): the mean loss moves by less than ``epsilon`` where, in every layer,
    ``sigma_{k+1} / sigma_1`` is below this.

    ``epsilon / (K * sum of C_l)``, K the loss's Lipschitz constant; without biases the sum is S2's
    ``B L * product of rho_l sigma_1^l``. ``input_norm`` (S2's B) bounds the inputs over which the mean is taken.
    Infinite where the net gives the same output for every input. Raises ``UserError`` for epsilon not above 0.
    """
    if not epsilon > 0:
        raise UserError(f"epsilon must be above 0, got {epsilon}")
    felt = LOSS_LIPSCHITZ[loss] * sum(sensitivities(stages, input_norm))
    return epsilon / felt if felt > 0 else math.inf
