"""Rank allocation as a knapsack: the least summed relative error of all layers within a budget (BALF)."""

from torch import Tensor, nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class Knapsack(Budgeted):
    """One of the options of every layer, a rank or dense, so that the summed relative error is least in the budget.

    BALF (arXiv 2509.25136): with ``WhitenedSVD`` the error of a layer at rank k is the part of its output's energy on
    calibration data that is dropped. A multiplier on the cost makes the layers independent, ``min_k error(k) + m *
    cost(k)``; bisection finds the one that meets the budget. That is the paper's; ours is that any decomposer may be
    given (with the plain SVD the energy is the weight's). The paper's batching of large Gram matrices is left out.
    """

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Allocate and cut. Raises ``UserError`` for a budget out of reach."""
        bench, costs, share = self.budget(Workbench.of(model, decomposer, objective))
        errors = {layer: relative_energy(spectrum) for layer, spectrum in bench.spectra.items()}

        def allocate(log_saving: float) -> dict[str, int]:
            multiplier = 10**-log_saving / costs.total
            return {
                layer: _cheapest(errors[layer], costs.curves[layer], costs.dense[layer], multiplier) for layer in errors
            }

        return bench.finish(costs.meet(share, allocate, low=-12.0, high=12.0))


def relative_energy(spectrum: Spectrum) -> Tensor:
    """The part of the squared singular values each rank drops: of the outputs', where the decomposition whitens."""
    error = spectrum.weighted_error()
    return (error / error[0].clamp_min(1e-300)).square()


def _cheapest(error: Tensor, cost: Tensor, dense: float, multiplier: float) -> int:
    """The rank of least ``error + multiplier * cost``, at least 1; the full one stands for the dense layer."""
    priced = error[1:] + multiplier * cost[1:]
    priced[-1] = multiplier * dense
    return int(priced.argmin()) + 1
