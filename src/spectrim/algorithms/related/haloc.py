"""Choose ranks by a differentiable architecture search (HALOC).

HALOC (Xiao et al., AAAI 2023, arXiv 2301.09422): each layer has candidate ranks with selection probabilities. The
forward pass mixes the candidates by their probabilities, and the loss contains the expected cost on the hardware.
Weights and probabilities are updated in turn. The most probable candidate of each layer is kept.

What differs here:

- The candidates of a layer are truncations of one SVD and share its factors. Their mixture is a gate on each component:
  the probability that the rank reaches it.
- The probabilities are drawn by Gumbel-softmax at ``temperature``. Otherwise the factors grow to make up for small
  ones.
- The turns are successive batches of the train split. Biases and norms belong to no candidate and learn in all of them.
- The candidates are the ranks with ``ratios`` of the layer's parameters, and the dense layer.
- The cost is the number of parameters of the whole model over that of the dense one, or of MACs if ``macs_kept`` is
  set. ``strength`` times the expected cost above the budget (above 0 without one) is added to the loss.
- With a budget, each layer keeps the largest candidate that its rank reaches with a probability common to all layers.

Tucker-2 is left out, as gates need singular components. So are latency on a device, and the paper's regularisation
against interference of candidates.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.algorithms.related.gated_training import Gate, GatedLayer, GatedTraining, Learning
from spectrim.algorithms.shared.budget import Costs
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.errors import UserError
from spectrim.tools.precision import wide
from spectrim.tools.settings import require_parts, settings


@settings
class HALOC(GatedTraining):
    """Learn selection probabilities of candidate ranks in each layer, and keep the most probable rank.

    ``temperature``: above 0; the temperature of the Gumbel-softmax.
    ``ratios``: in (0, 1); the parts of a layer's parameters that its candidates keep, beside the dense layer.
    """

    strength: float = 0.3
    temperature: float = 1.0
    ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature must be finite and above 0, got {self.temperature}")
        require_parts("ratios", self.ratios)

    def gate(self, spectrum: MatrixSpectrum, weight: int) -> Gate:
        ranks = {max(1, spectrum.rank_within(ratio * weight)) for ratio in self.ratios}
        smaller = sorted(rank for rank in ranks if rank <= spectrum.break_even)
        return _Candidates([*smaller, spectrum.max_rank], self.temperature)

    def penalty(self, layers: Mapping[str, GatedLayer], requested: float | None) -> Tensor:
        chances = [(wide(gated.logits).softmax(0), gated.gate.saved) for gated in layers.values()]
        expected = [own @ saved.to(own) for own, saved in chances]
        return (1 - torch.stack(expected).sum() - (requested or 0.0)).clamp_min(0)

    def next_learning(self, learning: Learning) -> Learning:
        return Learning.WEIGHTS if learning is Learning.GATES else Learning.GATES

    def kept(self, layers: Mapping[str, GatedLayer], costs: Costs, requested: float | None) -> dict[str, Tensor]:
        gates = {name: _candidates(gated) for name, gated in layers.items()}
        chances = {name: gated.parameter.detach().softmax(0).double().cpu() for name, gated in layers.items()}
        if requested is None:
            return {name: gates[name].reached[int(own.argmax())] for name, own in chances.items()}
        at_least = {name: own.flip(0).cumsum(0).flip(0) for name, own in chances.items()}

        def ranks_at(doubt: float) -> dict[str, int]:
            return {name: gates[name].ranks[max(0, int(own.ge(1 - doubt).sum()) - 1)] for name, own in at_least.items()}

        ranks = costs.meet(requested, ranks_at, low=0.0, high=1.0)
        return {name: gate.reached[gate.ranks.index(ranks[name])] for name, gate in gates.items()}


class _Candidates(Gate):
    """Map J logits to gates by the probabilities of J candidate ranks.

    ``reached``: shape (J, R); 1 if candidate j, of rank ``ranks[j]``, has component i.
    ``saved``: shape (J,); the part of the whole model's cost that each candidate saves.
    """

    def __init__(self, ranks: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.ranks, self.temperature = tuple(ranks), temperature
        self.reached: Tensor
        reached = torch.arange(self.ranks[-1]) < torch.tensor(self.ranks).unsqueeze(1)
        self.register_buffer("reached", reached.float(), persistent=False)

    def set_saved(self, saved: Tensor) -> None:
        super().set_saved(saved[list(self.ranks)])

    def first_logits(self) -> Tensor:
        return torch.zeros(len(self.ranks))

    def forward(self, logits: Tensor) -> Tensor:
        if not self.training:
            return self.reached[int(logits.argmax())].to(logits)
        chances = F.gumbel_softmax(wide(logits), tau=self.temperature, dim=0)
        return (chances @ self.reached.to(chances)).to(logits)


def _candidates(gated: GatedLayer) -> _Candidates:
    assert isinstance(gated.gate, _Candidates)
    return gated.gate
