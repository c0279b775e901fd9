"""Spend the budget where it lowers the summed relative error of the layers most: a knapsack over ranks (BALF).

BALF (arXiv 2509.25136): with ``WhitenedSVD`` the error of a layer at rank k is the part of the energy of its outputs on
calibration data that is dropped. A multiplier m on the cost makes the layers independent: each takes
``min_k error(k) + m * cost(k)``. Bisection finds the m that meets the budget.

What differs here: any decomposer may be used, and with the plain SVD the energy is that of the weight. The paper's
batching of large Gram matrices is left out: ``layers_at_once`` of the objective takes moments in blocks of layers.
"""

from torch import Tensor, nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class Knapsack(Budgeted):
    """Give each layer a rank, or leave it dense, so that the summed relative error is least within the budget."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Allocate and cut. Raises ``UserError`` for a budget out of reach."""
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        errors = {layer: relative_energy(spectrum) for layer, spectrum in bench.spectra.items()}

        def allocate(log_saving: float) -> dict[str, int]:
            multiplier = 10**-log_saving / costs.total
            return {
                layer: _cheapest(errors[layer], costs.curves[layer], costs.dense[layer], multiplier) for layer in errors
            }

        return bench.finish(costs.meet(requested, allocate, low=-12.0, high=12.0))


def relative_energy(spectrum: Spectrum) -> Tensor:
    """Return the part of the energy that each rank drops. Shape (R + 1,).

    It is the energy of the outputs if the decomposition whitens, and that of the weight if not.
    """
    error = spectrum.weighted_error()
    return (error / error[0].clamp_min(1e-300)).square()


def _cheapest(error: Tensor, cost: Tensor, dense: float, multiplier: float) -> int:
    """Return the rank, at least 1, with the least ``error + multiplier * cost``. The full rank stands for dense."""
    priced = error[1:] + multiplier * cost[1:]
    priced[-1] = multiplier * dense
    return int(priced.argmin()) + 1
