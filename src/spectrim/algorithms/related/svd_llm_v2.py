"""Share a budget out among layers of one type by the loss of their truncation (SVD-LLM V2).

SVD-LLM V2 (Wang et al., NAACL 2025, arXiv 2503.12340), heterogeneous compression ratios: L is the least error of a
layer's outputs when it is cut to the target ratio, the Frobenius norm over all calibration inputs. Among the layers of
one type, such as all query projections, the part removed of each is proportional to ``1 / log L``. The mean part
removed of a type is the target.

What differs here:

- A logarithm below 1 counts as 1: below it the formula means nothing.
- L counts a position as often as there are predictions: samples, or the predicted tokens of a text.
- The target is searched for, so that the whole model meets the budget. No part above 1 is removed.
- The second half of the paper, two SVDs in place of a Cholesky factor, is what ``WhitenedSVD`` does. The update of
  factors is left out: ``Refitted`` fits them after any algorithm.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.layer_types import by_type
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import sample_count
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.statistics.batch_loss import batch_weight
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

LOWEST = -1e3  # target at which every layer is down to rank 1, whatever its loss


@settings
class SVDLLMv2(Budgeted):
    """Remove less of the layers whose truncation loses more, among layers of one type."""

    decomposer: ClassVar[Decomposer] = WhitenedSVD("channel")  # where the user names none

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Allocate and cut. Raises ``UserError`` for a budget out of reach."""
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        types = by_type(bench.model, bench.spectra)
        losses = {name: errors.tolist() for name, errors in errors_of_all(bench).items()}

        def ranks_at(target: float) -> dict[str, int]:
            uniform = {name: bench.spectra[name].rank_within(max(target, 0) * bench.params_of(name)) for name in losses}
            found: dict[str, int] = {}
            for group in types:
                at_target = {name: losses[name][min(uniform[name], len(losses[name]) - 1)] for name in group}
                for name, removed in removed_parts(at_target, 1 - target).items():
                    found[name] = max(1, bench.spectra[name].rank_within((1 - removed) * bench.params_of(name)))
            return found

        return bench.finish(costs.meet(requested, ranks_at, low=LOWEST, high=1.0))


def errors_of_all(bench: Workbench) -> dict[str, Tensor]:
    """Return L of each layer for every rank: the Frobenius norm of the errors of all its calibration outputs."""
    root = math.sqrt(_predictions(bench.objective, bench.decomposer.samples))
    return {name: root * spectrum.weighted_error() for name, spectrum in bench.spectra.items()}


def removed_parts(losses: Mapping[str, float], mean: float) -> dict[str, float]:
    """Return the part that is removed of each layer of a type. Their mean is ``mean``, unless a part would exceed 1."""
    scores = {name: 1 / math.log(max(loss, math.e)) for name, loss in losses.items()}
    share = len(scores) * mean / sum(scores.values())
    return {name: min(1.0, share * score) for name, score in scores.items()}


def _predictions(objective: Objective, samples: int) -> int:
    """Return the number of predictions of the calibration batches that moments of so many ``samples`` are taken of."""
    count = read = 0
    for inputs, targets in objective.batches("calibration") if samples else ():
        count, read = count + batch_weight(objective.loss, targets, inputs), read + sample_count(targets, inputs)
        if read >= samples:
            break
    return max(1, int(objective.processes("calibration").add_up(torch.tensor(count)))) if samples else 1
