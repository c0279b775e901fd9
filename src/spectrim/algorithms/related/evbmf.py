"""Give each layer the rank that empirical variational Bayesian matrix factorisation finds in closed form (EVBMF).

Kim Y.-D. et al. 2016 (arXiv 1511.06530) choose the ranks of a network by the global analytic solution of Nakajima et
al. 2013 (JMLR 14:1-37): a weight is a low-rank matrix plus Gaussian noise, and a layer keeps the components that stand
out from the noise. It needs no data and no tuning.

What differs here:

- The model is applied to the matrix that the decomposer makes of a layer. The paper applies it to the two channel
  unfoldings of a convolution, for a Tucker decomposition.
- A layer of pure noise keeps one component. A grouped convolution keeps the largest rank of its groups.
- A budget scales all ranks by one factor, so that the method can be compared at equal size.

The paper fine-tunes afterwards. ``FineTuning`` does that here.
"""

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from torch import nn

from spectrim.algorithms.rank_selection import singular_values
from spectrim.algorithms.shared.budget import MaybeBudgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

GRID = 200  # noise variances that are compared before the best one is refined


@settings
class EVBMF(MaybeBudgeted):
    """Keep the components of each layer that empirical variational Bayes tells from noise. No data is read.

    A layer whose rank lies above break-even stays dense.

    ``params_kept``, ``macs_kept``, ``milliseconds``: at most one budget. The largest common factor on all ranks meets
        it from below. None: the ranks are kept as found.
    ``weaken``: in [0, 1); moves each rank by this part of the way to the full rank (MUSCO, Gusak et al. 2019, arXiv
        1903.09973).
    """

    weaken: float = 0.0

    decomposer: ClassVar[Decomposer] = SVD()  # its singular values are those of the noise model

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weaken < 1:
            raise UserError(f"weaken must lie in [0, 1), got {self.weaken}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find the ranks and cut. The log holds the analytic rank of each layer, and the rank after ``weaken``.

        Raises ``UserError`` for a layer without singular values, and for a budget out of reach.
        """
        bench = Workbench.of(model, decomposer, objective)
        found = {name: analytic_rank(name, spectrum) for name, spectrum in bench.spectra.items()}
        full = {name: spectrum.max_rank for name, spectrum in bench.spectra.items()}
        ranks = {name: max(1, round(rank + self.weaken * (full[name] - rank))) for name, rank in found.items()}
        log: list[dict] = [{"layer": name, "analytic_rank": found[name], "rank": ranks[name]} for name in found]
        if not self.has_budget:
            return bench.finish(ranks, log)
        bench, costs, requested = self.budget(bench)

        def scaled(factor: float) -> dict[str, int]:
            return {name: min(full[name], max(1, round(factor * rank))) for name, rank in ranks.items()}

        most = max(full[name] / rank for name, rank in ranks.items())
        return bench.finish(costs.meet(requested, scaled, low=0.0, high=most), log)


def analytic_rank(name: str, spectrum: Spectrum) -> int:
    """Return the analytic rank of layer ``name``; 0 if all is noise. Raises ``UserError`` without singular values."""
    singular_values(name, spectrum)  # raises for a spectrum without singular values
    assert isinstance(spectrum, MatrixSpectrum)
    _, outputs, inputs = spectrum.shape
    return max(evb_rank(group.numpy(), outputs, inputs) for group in spectrum.importance.double().cpu())


def evb_rank(S_R: NDArray[np.float64], outputs: int, inputs: int) -> int:
    """Return the number of components that rise above noise of estimated variance, in 0 .. min(outputs, inputs).

    Let L <= M be the two sides, a = L / M, and x a squared singular value over M times the noise variance. A component
    is kept if ``x > (1 + t) (1 + a / t)``. Here t is the root of ``phi(t) + phi(t / a)`` with
    ``phi(z) = log(1 + z) / z - 1/2`` (Nakajima et al. 2013). The noise variance is the one with the lowest free energy.
    At that variance no more than about L / (1 + a) components can be told from noise.

    ``S_R``: all min(outputs, inputs) singular values.
    """
    L, M = sorted((outputs, inputs))
    energy_R = np.square(S_R) / M
    if not energy_R.any():
        return 0
    threshold = _threshold(L / M)
    return int((energy_R > threshold * _noise_variance(energy_R, L / M, threshold)).sum())


def _threshold(a: float) -> float:
    """Return the smallest x of a component that is kept."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    root = 2.5129 * math.sqrt(a)  # the root at a = 1, and close to it elsewhere
    t = brentq(lambda t: phi(t) + phi(t / a), root / 4, 4 * root)
    return (1 + t) * (1 + a / t)


def _noise_variance(energy_R: NDArray[np.float64], a: float, threshold: float) -> float:
    """Return the variance with the lowest free energy, between the bounds of Nakajima et al. 2013.

    The free energy has several minima. The lowest point of a logarithmic grid is found first and then refined.
    """
    L = len(energy_R)
    most_kept = min(math.ceil(L / (1 + a)) - 1, L - 1)
    high = energy_R.mean()
    low = max(energy_R[most_kept] / threshold, energy_R[most_kept:].mean(), 1e-12 * high)
    grid = np.linspace(math.log(low), math.log(high), GRID)
    best = int(np.argmin([_free_energy(point, energy_R, a, threshold) for point in grid]))
    bounds = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
    if bounds[1] <= bounds[0]:  # all singular values are equal
        return float(high)
    found = minimize_scalar(_free_energy, bounds=bounds, args=(energy_R, a, threshold), method="bounded")
    return math.exp(found.x)


def _free_energy(log_variance: float, energy_R: NDArray[np.float64], a: float, threshold: float) -> float:
    """Return the free energy of the whole matrix, up to a constant.

    It is the sum of ``x + log(variance)`` over all components, plus a term for each component that is kept.
    """
    x_R = energy_R * math.exp(-log_variance)
    x = x_R[x_R > threshold]
    half = x - (1 + a)
    t = (half + np.sqrt(np.square(half) - 4 * a)) / 2
    gained = np.log1p(t) + a * np.log1p(t / a) - t
    return float(x_R.sum() + len(x_R) * log_variance + gained.sum())
