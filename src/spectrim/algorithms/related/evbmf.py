"""The rank that a Bayesian model of a noisy low-rank matrix gives a layer in closed form (EVBMF)."""

import math

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
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

GRID = 200  # noise variances looked at before the search for the least free energy is refined


@settings
class EVBMF(MaybeBudgeted):
    """Every layer keeps the components that empirical variational Bayes tells from noise; no data, nothing to tune.

    Kim Y.-D. et al. 2016 (arXiv 1511.06530) take the ranks of a network from the global analytic solution of Nakajima
    et al. 2013 (JMLR 14:1-37). That is the paper's; ours is that it is asked of the matrix which ``decomposer`` makes
    of a layer, where the paper asks it of the two channel unfoldings of a convolution for a Tucker decomposition, and
    that a layer of pure noise keeps one component. A grouped convolution keeps the largest rank of any group. The
    fine-tuning that follows in the paper is left out: that is ``FineTuning``.

    ``weaken``, in [0, 1): moves the rank by this part of the way to the full one (MUSCO, Gusak et al. 2019, arXiv
    1903.09973). ``params_kept`` or ``macs_kept``, our reading so that it can be compared at a budget: all ranks found
    are scaled by one factor, the largest that meets it. Without, they are kept as found. Above break-even a layer
    stays dense.
    """

    weaken: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weaken < 1:
            raise UserError(f"weaken must lie in [0, 1), got {self.weaken}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find the ranks and cut. The log has, of each layer, the analytic rank and the one after ``weaken``.

        Raises ``UserError`` for a layer without singular values and for a budget out of reach.
        """
        bench = Workbench.of(model, decomposer, objective)
        found = {name: analytic_rank(name, spectrum) for name, spectrum in bench.spectra.items()}
        full = {name: spectrum.max_rank for name, spectrum in bench.spectra.items()}
        ranks = {name: max(1, round(rank + self.weaken * (full[name] - rank))) for name, rank in found.items()}
        log: list[dict] = [{"layer": name, "analytic_rank": found[name], "rank": ranks[name]} for name in found]
        if not self.has_budget:
            return bench.finish(ranks, log)
        bench, costs, share = self.budget(bench)

        def scaled(factor: float) -> dict[str, int]:
            return {name: min(full[name], max(1, round(factor * rank))) for name, rank in ranks.items()}

        most = max(full[name] / rank for name, rank in ranks.items())
        return bench.finish(costs.meet(share, scaled, low=0.0, high=most), log)


def analytic_rank(name: str, spectrum: Spectrum) -> int:
    """The analytic rank of layer ``name``, 0 where all is noise. Raises ``UserError`` without singular values."""
    singular_values(name, spectrum)  # refuses, in one line, what is no matrix
    assert isinstance(spectrum, MatrixSpectrum)
    _, outputs, inputs = spectrum.shape
    return max(evb_rank(group.numpy(), outputs, inputs) for group in spectrum.importance.double().cpu())


def evb_rank(S_R: NDArray[np.float64], outputs: int, inputs: int) -> int:
    """How many components of a matrix rise above noise of an estimated variance, 0 to min(outputs, inputs).

    ``S_R``: all its min(outputs, inputs) singular values. With L <= M the two sides, a = L / M and x the squared
    singular value over M times the noise variance, a component is kept where ``x > (1 + t) (1 + a / t)``, t the root of
    ``phi(t) + phi(t / a)`` with ``phi(z) = log(1 + z) / z - 1/2`` (Nakajima et al. 2013). The noise variance is that of
    the least free energy; with it no more than about L / (1 + a) components can be told from noise.
    """
    L, M = sorted((outputs, inputs))
    energy_R = np.square(S_R) / M
    if not energy_R.any():
        return 0
    least = _threshold(L / M)
    return int((energy_R > least * _noise_variance(energy_R, L / M, least)).sum())


def _threshold(a: float) -> float:
    """The smallest x of a component that is kept."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    root = 2.5129 * math.sqrt(a)  # the root at a = 1, and close to it elsewhere
    t = brentq(lambda t: phi(t) + phi(t / a), root / 4, 4 * root)
    return (1 + t) * (1 + a / t)


def _noise_variance(energy_R: NDArray[np.float64], a: float, least: float) -> float:
    """Where the free energy is least, between the bounds that Nakajima et al. 2013 prove for it.

    The free energy has more than one minimum: the lowest of a grid, even in the logarithm, is refined.
    """
    L = len(energy_R)
    most_kept = min(math.ceil(L / (1 + a)) - 1, L - 1)
    high = energy_R.mean()
    low = max(energy_R[most_kept] / least, energy_R[most_kept:].mean(), 1e-12 * high)
    grid = np.linspace(math.log(low), math.log(high), GRID)
    best = int(np.argmin([_free_energy(point, energy_R, a, least) for point in grid]))
    bounds = grid[max(0, best - 1)], grid[min(GRID - 1, best + 1)]
    if bounds[1] <= bounds[0]:  # all singular values are equal
        return float(high)
    found = minimize_scalar(_free_energy, bounds=bounds, args=(energy_R, a, least), method="bounded")
    return math.exp(found.x)


def _free_energy(log_variance: float, energy_R: NDArray[np.float64], a: float, least: float) -> float:
    """Of the whole matrix, up to a constant: ``sum x + log(variance)``, and for a kept component what it gains."""
    x_R = energy_R * math.exp(-log_variance)
    x = x_R[x_R > least]
    half = x - (1 + a)
    t = (half + np.sqrt(np.square(half) - 4 * a)) / 2
    gained = np.log1p(t) + a * np.log1p(t / a) - t
    return float(x_R.sum() + len(x_R) * log_variance + gained.sum())
