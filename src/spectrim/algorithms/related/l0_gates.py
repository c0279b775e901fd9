"""Drop singular components by noisy gates that are learnt beside the weights (probabilistic l0 gates).

Cao et al., IJCAI 2024, pp. 3780-3788: each component has a gate ``z = clamp(mu + sigma * eps + 1.2, 0, 1)`` with normal
eps, and mu is learnt. The penalty is ``strength`` times the mean probability that a gate is open,
``Phi((mu + 1.2) / sigma)``. It is a smooth stand-in for the l0 norm of the slices of a tensor decomposition. Components
whose gate without noise is above 0 are kept.

What differs here:

- The slices are singular components. All groups of a grouped convolution share one gate.
- The mean is over all gates of the network.
- ``sigma`` is fixed, and mu starts at 0.
- A layer keeps at least the component with the largest mu.
- With a budget, the penalty is 0 while the open gates meet it. At the end the components with the smallest mu are
  dropped until the budget is met. A closed gate is not opened again.

Other tensor formats and embeddings are left out, as the factors here are those of an SVD.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spectrim.algorithms.related.gated_training import Gate, GatedLayer, GatedTraining
from spectrim.algorithms.shared.budget import Costs
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.errors import UserError
from spectrim.tools.settings import settings

OFFSET = 1.2  # a gate with mu = 0 is open, and nearly always stays so under the noise of the paper


@settings
class L0Gates(GatedTraining):
    """Learn a noisy gate on each singular component, and drop the components whose gate ends closed.

    ``sigma``: above 0; the standard deviation of the noise on the gates.
    """

    rate: float = 100.0
    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < math.inf:
            raise UserError(f"sigma, the noise on the gates, must be finite and above 0, got {self.sigma}")

    def gate(self, spectrum: MatrixSpectrum, weight: int) -> Gate:
        return _ClampedNormal(spectrum.max_rank, self.sigma)

    def penalty(self, layers: Mapping[str, GatedLayer], requested: float | None) -> Tensor:
        logits = torch.cat([gated.logits for gated in layers.values()])
        penalty = torch.special.ndtr((logits + OFFSET) / self.sigma).mean()
        if requested is None:
            return penalty
        saved = [
            gated.gate.saved.index_select(0, gated.eval_gates().count_nonzero().clamp_min(1).reshape(1))
            for gated in layers.values()
        ]
        return penalty * (1 - torch.cat(saved).sum() > requested)

    def kept(self, layers: Mapping[str, GatedLayer], costs: Costs, requested: float | None) -> dict[str, Tensor]:
        mu = {name: gated.parameter.detach() for name, gated in layers.items()}
        gates = {name: _one_at_least(gated.eval_gates(), mu[name]) for name, gated in layers.items()}
        if requested is None:
            return gates

        def ranks_at(depth: float) -> dict[str, int]:
            """Return the number of open gates with mu of at least ``-depth``, at least 1 per layer."""
            return {name: max(1, int((gates[name].gt(0) & own.ge(-depth)).sum().item())) for name, own in mu.items()}

        extremes = [float(value) for own in mu.values() for value in own.aminmax()]
        ranks = costs.meet(requested, ranks_at, low=-max(extremes) - 1, high=-min(extremes))
        return {name: gate * _leading(mu[name], ranks[name]) for name, gate in gates.items()}


class _ClampedNormal(Gate):
    def __init__(self, count: int, sigma: float) -> None:
        super().__init__()
        self.count, self.sigma = count, sigma

    def first_logits(self) -> Tensor:
        return torch.zeros(self.count)

    def forward(self, mu: Tensor) -> Tensor:
        noise = self.sigma * torch.randn_like(mu) if self.training else 0.0
        return (mu + noise + OFFSET).clamp(0, 1)


def _one_at_least(gates: Tensor, mu: Tensor) -> Tensor:
    return gates if gates.any() else _leading(mu, 1)


def _leading(mu: Tensor, rank: int) -> Tensor:
    """Return 1 for the ``rank`` largest entries and 0 for the others."""
    return torch.zeros_like(mu).scatter(0, mu.topk(rank).indices, 1.0)
