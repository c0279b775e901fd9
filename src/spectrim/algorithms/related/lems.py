"""Predict the error of every rank from one measurement a layer and its energy, and solve for all ranks (LEMS).

LEMS (arXiv 2610.32878): each layer alone is cut to one small size, and the KL divergence of the predictions is
measured. At other ranks the divergence is taken as proportional to the energy of the dropped components. A factor
``1 + depth * (part of the network that follows)`` lets early layers lose less, because their errors pass through what
follows. No layer keeps less than a floor. An integer program then finds the ranks within the budget. The paper's
decomposition is KFAC-SVD, which is ``TwoSidedSVD`` here.

What differs here:

- The integer program is solved as a multiple-choice knapsack (``knapsack``), without a commercial solver.
- The factor goes by the place of a layer among all layers, not by that of its block. The paper tries ten pairs of
  settings of this factor on the model. Here ``depth`` is one setting.
- Convolutions are cut too, for which the paper uses no factor: set ``depth`` to 0 there.
"""

from typing import ClassVar

import numpy as np
from torch import nn

from spectrim.algorithms.shared.budget import Budgeted, Costs
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.divergence import divergences
from spectrim.algorithms.shared.knapsack import Options, choose
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.best_view import BestView
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import require_parts, settings


@settings
class LEMS(Budgeted):
    """Minimise the summed divergence that one measurement a layer and its energy curve predict, within the budget.

    ``point``: in (0, 1); the part of its parameters at which each layer is measured.
    ``floor``: in (0, 1); the part of its parameters that a factored layer keeps at least.
    ``depth``: at least 0; how much more the first layer counts than the last one, as a part of it.
    ``samples``: number of calibration samples for the measurements.
    """

    point: float = 0.1
    floor: float = 0.1
    depth: float = 5.0
    samples: int = 100

    decomposer: ClassVar[Decomposer] = BestView(TwoSidedSVD(factors="pivoted"))  # where the user names none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("point", "floor"):
            require_parts(name, [getattr(self, name)])
        if not self.depth >= 0:
            raise UserError(f"depth must be at least 0, got {self.depth}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure, solve and cut. The log holds the measurements: layer, rank, divergence.

        Raises ``UserError`` for a budget out of reach of the floor, or outputs that are no class scores.
        """
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        costs.require(requested)
        least, measured = (
            {name: bench.rank_at(name, part) for name in bench.spectra} for part in (self.floor, self.point)
        )
        costs.require_of_rule(requested, least)
        moved = divergences(bench, measured, self.samples)
        log: list[dict] = [{"layer": name, "rank": measured[name], "divergence": moved[name]} for name in measured]
        ranks, options, last = {}, {}, max(len(bench.spectra) - 1, 1)
        for place, name in enumerate(bench.spectra):
            factor = 1 + self.depth * (last - place) / last
            ranks[name], options[name] = _options(bench, costs, name, least[name], measured[name], factor * moved[name])
        chosen = choose(options, costs.of_layers(requested, options))
        return bench.finish({name: ranks[name][option] for name, option in chosen.items()}, log)


def _options(
    bench: Workbench, costs: Costs, name: str, least: int, measured: int, moved: float
) -> tuple[list[int], Options]:
    """Return the ranks that layer ``name`` may take, and what they cost and change; the last one stands for dense.

    ``least``: the smallest of the ranks. ``moved``: the change at rank ``measured``.
    """
    spectrum, curve = bench.spectra[name], costs.curves[name].tolist()
    energy = spectrum.weighted_error().square().tolist()
    ranks = [rank for rank in range(least, spectrum.break_even + 1) if curve[rank] < costs.dense[name]]
    scale = moved / energy[measured] if energy[measured] > 0 else 0.0
    changes = [scale * energy[rank] for rank in ranks] + [0.0]
    prices = [curve[rank] for rank in ranks] + [costs.dense[name]]
    return [*ranks, costs.full(name)], Options(np.array(prices), np.array(changes))
