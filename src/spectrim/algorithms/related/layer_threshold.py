"""A threshold on the energy of the singular values, chosen for each layer by itself against the accuracy."""

import math
from collections.abc import Sequence

from torch import nn
from tqdm import tqdm

from spectrim.algorithms.related.judged import JudgedBy, error_or_loss
from spectrim.algorithms.shared.budget import MaybeBudgeted, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.algorithms.truncation import rank_of_energy
from spectrim.decomposers.spectrum import Decomposer, Spectrum, content
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools.settings import settings


@settings
class LayerThreshold(MaybeBudgeted):
    """Each layer keeps the least energy at which, cut alone, it costs no more accuracy than a tolerance.

    Stands for "Ito et al. 2021", which S2 lists (layers independent, heuristic, after training) and which we could not
    identify: all of it is our reading of those three labels. A layer is cut at one of ``energies``, parts of its
    squared singular values, with all others dense, from the largest down, for as long as accuracy on calibration drops
    by no more than the tolerance. Where even the first drops too far, or lies above break-even, it stays dense.

    Exactly one of ``tolerance``, at least 0, of accuracy or of loss as ``judged_by`` says, the same for every layer;
    and ``params_kept`` or ``macs_kept``, in (0, 1): the least tolerance that meets this budget of the whole model.
    """

    params_kept: float | None = 0.5
    tolerance: float | None = None
    energies: Sequence[float] = (0.999, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    judged_by: JudgedBy = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_one("tolerance")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise UserError(f"tolerance must be at least 0, got {self.tolerance}")
        if not self.energies or not all(0 < energy < 1 for energy in self.energies):
            raise UserError(f"energies must lie in (0, 1), got {list(self.energies)}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure and cut. The log holds every measurement: step, layer, rank, score (the drop of accuracy or the rise
        of the loss) and params_kept, with that layer alone cut. They are the same whatever the budget, and are not
        taken again for another one.

        Raises ``UserError`` for a budget out of reach of the energies and without class scores.
        """
        bench = Workbench.of(model, decomposer, objective)
        bench, costs, share = self.budget(bench) if self.has_budget else (bench, costs_of(bench, "params"), None)
        layers = _Layers(self, bench)

        def ranks_at(place: float) -> dict[str, int]:
            """From any tolerance (0), which measures every layer once and for all, to none (1)."""
            return layers.ranks(1 / place - 1 if place else math.inf)

        with tqdm(total=layers.count, desc="thresholds", unit="model", leave=False, disable=None) as layers.bar:
            if self.tolerance is not None:
                chosen = layers.ranks(self.tolerance)
            else:
                assert share is not None
                chosen = costs.meet(share, ranks_at, low=0.0, high=1.0)
        return bench.finish(chosen, [*layers.log.values()])


class _Layers:
    """The layers and what was measured of each; no rank of a layer is measured twice, in no run on this objective.

    ``log``: the measurements that this run asked for.
    """

    def __init__(self, chosen: LayerThreshold, bench: Workbench) -> None:
        self.judged_by, self.bench = chosen.judged_by, bench
        self.costs = costs_of(bench, "params")
        self.working = replacing.apply(bench.model, RankPlan(), {})
        self.dense = error_or_loss(self.working, bench.objective, self.judged_by)
        self.options = {name: self._options(spectrum, chosen.energies) for name, spectrum in bench.spectra.items()}
        self.count = sum(map(len, self.options.values()))
        self.log: dict[tuple[str, int], dict] = {}
        self.key = bench.decomposer, chosen.judged_by, content(bench.model.state_dict().values())
        self.bar: tqdm

    @staticmethod
    def _options(spectrum: Spectrum, energies: Sequence[float]) -> list[int]:
        """The ranks of ``energies`` that make the layer smaller, falling."""
        ranks = {rank_of_energy(spectrum, energy) for energy in energies}
        return sorted((rank for rank in ranks if rank <= spectrum.break_even), reverse=True)

    def ranks(self, tolerance: float) -> dict[str, int]:
        """Of each layer that may be cut, the smallest rank before the first that loses more than ``tolerance``."""
        found = {}
        for name, options in self.options.items():
            for rank in options:
                if self.score(name, rank) > tolerance:
                    break
                found[name] = rank
        return found

    def score(self, name: str, rank: int) -> float:
        """How much worse the model is with this layer alone at ``rank``."""
        if (name, rank) not in self.log:
            key = (*self.key, name, rank)
            score = self.bench.objective.remembered(
                self.bench.model, "thresholds", lambda: key, lambda: self._measured(name, rank)
            )
            kept = self.costs.share({name: rank})
            entry = {"step": len(self.log), "layer": name, "rank": rank, "score": score, "params_kept": kept}
            self.log[name, rank] = entry
            self.bar.update()
        return float(self.log[name, rank]["score"])

    def _measured(self, name: str, rank: int) -> float:
        layer = self.working.get_submodule(name)
        replacing.replace(self.working, name, self.bench.spectra[name].factor(rank))
        score = error_or_loss(self.working, self.bench.objective, self.judged_by) - self.dense
        replacing.replace(self.working, name, layer)
        return score
