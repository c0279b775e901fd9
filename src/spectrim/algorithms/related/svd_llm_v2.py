"""Share a budget out among layers of one type by the loss of their truncation (SVD-LLM V2).

SVD-LLM V2 (Wang et al., NAACL 2025, arXiv 2503.12340), heterogeneous compression ratios: L is the least error of a
layer's outputs when it is cut to the target ratio. Among the layers of one type, such as all query projections, the
part removed of each is proportional to ``1 / log L``. The mean part removed of a type is the target.

What differs here:

- ``1 / log L`` depends on the unit of L, and means nothing for L below 1. It is replaced by
  ``1 / (1 + log(L / L_min))``, with the least L of the type.
- The target is searched for, so that the whole model meets the budget. No part above 1 is removed.
- The second half of the paper, two SVDs in place of a Cholesky factor, is what ``WhitenedSVD`` does. The update of
  factors is left out: ``Refitted`` fits them after any selector.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.layer_types import by_type
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

TINY = 1e-300
LOWEST = -1e3  # target at which every layer is down to rank 1, whatever its loss


@settings
class SVDLLMv2(Budgeted):
    """Remove less of the layers whose truncation loses more, among layers of one type."""

    decomposer: ClassVar[Decomposer] = WhitenedSVD("channel")  # where the user names none

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Allocate and cut. Raises ``UserError`` for a budget out of reach."""
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        types = by_type(bench.model, bench.spectra)
        losses = {name: spectrum.weighted_error().tolist() for name, spectrum in bench.spectra.items()}

        def ranks_at(target: float) -> dict[str, int]:
            uniform = {name: bench.spectra[name].rank_within(max(target, 0) * bench.params_of(name)) for name in losses}
            found: dict[str, int] = {}
            for group in types:
                at_target = {name: losses[name][min(uniform[name], len(losses[name]) - 1)] for name in group}
                for name, removed in removed_parts(at_target, 1 - target).items():
                    found[name] = max(1, bench.spectra[name].rank_within((1 - removed) * bench.params_of(name)))
            return found

        return bench.finish(costs.meet(requested, ranks_at, low=LOWEST, high=1.0))


def removed_parts(losses: Mapping[str, float], mean: float) -> dict[str, float]:
    """Return the part that is removed of each layer of a type. Their mean is ``mean``, unless a part would exceed 1."""
    least = max(min(losses.values()), TINY)
    scores = {name: 1 / (1 + math.log(max(loss, least) / least)) for name, loss in losses.items()}
    share = len(scores) * mean / sum(scores.values())
    return {name: min(1.0, share * score) for name, score in scores.items()}
