"""Choose for each layer by itself what part of its energy it keeps, by the accuracy that the layer alone costs.

This stands for "Ito et al. 2021", which S2 lists with three labels: layers independent, heuristic, after training. The
paper could not be identified. All of it is a reading of these labels.

A layer is cut at one of ``energies``, parts of its squared singular values, while all others stay dense. The energies
are tried from the largest down, as long as the calibration accuracy drops by no more than a tolerance. The layer keeps
the last that passed. It stays dense if the first fails, or if the rank lies above break-even.
"""

import math
from collections.abc import Sequence

from torch import nn

from spectrim.algorithms.related.judged import JudgedBy, error_or_loss
from spectrim.algorithms.shared.budget import Costs, MaybeBudgeted, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.algorithms.truncation import rank_of_energy
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied
from spectrim.tools.content import of_state
from spectrim.tools.live import Bar
from spectrim.tools.settings import require_parts, settings


@settings
class LayerThreshold(MaybeBudgeted):
    """Keep in each layer the least energy that, with this layer alone cut, costs no more accuracy than a tolerance.

    Set exactly one of ``tolerance`` and the budgets of ``Budgeted``. A budget is met by the smallest tolerance that
    meets it.

    ``tolerance``: at least 0; a drop of accuracy in [0, 1] or a rise of the loss, as ``judged_by`` says. It is the same
        for all layers.
    ``energies``: in (0, 1); the parts of the squared singular values to try.
    ``judged_by``: ``accuracy``, or ``loss`` for a model without class scores.
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
        require_parts("energies", self.energies)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure and cut. The measurements are the same for every budget, and are not taken again for another one.

        The log holds each measurement: step, layer, rank, score (drop of accuracy or rise of the loss) and
        ``params_kept``, with that layer alone cut. Raises ``UserError`` for a budget out of reach of the energies, and
        without class scores.
        """
        bench, costs, requested = self.budget_or_params(Workbench.of(model, decomposer, objective))
        layers = _Layers(self, bench, costs if costs.measure == "params" else costs_of(bench, "params"))

        def ranks_at(place: float) -> dict[str, int]:
            """Return the ranks at a tolerance that falls from infinity (0), where every layer is measured, to 0 (1)."""
            return layers.ranks(1 / place - 1 if place else math.inf)

        with Bar(total=layers.count, desc="thresholds", unit="model", leave=False) as layers.bar:
            if self.tolerance is not None:
                chosen = layers.ranks(self.tolerance)
            else:
                assert requested is not None
                chosen = costs.meet(requested, ranks_at, low=0.0, high=1.0)
        return bench.finish(chosen, [*layers.log.values()])


class _Layers:
    """Measure the layers one at a time, and remember what was measured in the memory of the objective.

    No rank of a layer is measured twice, in any run on the same objective.
    """

    def __init__(self, chosen: LayerThreshold, bench: Workbench, params: Costs) -> None:
        self.judged_by, self.bench, self.params = chosen.judged_by, bench, params
        self.working = copied(bench.model)
        self.dense = error_or_loss(self.working, bench.objective, self.judged_by)
        self.options = {name: self._options(spectrum, chosen.energies) for name, spectrum in bench.spectra.items()}
        self.count = sum(map(len, self.options.values()))
        self.log: dict[tuple[str, int], dict] = {}
        self.key = bench.decomposer, chosen.judged_by, of_state(bench.model)
        self.bar: Bar

    @staticmethod
    def _options(spectrum: Spectrum, energies: Sequence[float]) -> list[int]:
        """Return the ranks of ``energies`` that make the layer smaller, in falling order."""
        ranks = {rank_of_energy(spectrum, energy) for energy in energies}
        return sorted((rank for rank in ranks if rank <= spectrum.break_even), reverse=True)

    def ranks(self, tolerance: float) -> dict[str, int]:
        """Return for each layer the smallest rank before the first that loses more than ``tolerance``."""
        found = {}
        for name, options in self.options.items():
            for rank in options:
                if self.score(name, rank) > tolerance:
                    break
                found[name] = rank
        return found

    def score(self, name: str, rank: int) -> float:
        """Return how much worse the model is with this layer alone at ``rank``."""
        if (name, rank) not in self.log:
            key = (*self.key, name, rank)
            score = self.bench.objective.remembered(
                self.bench.model, "thresholds", lambda: key, lambda: self._measured(name, rank)
            )
            kept = self.params.achieved({name: rank})
            entry = {"step": len(self.log), "layer": name, "rank": rank, "score": score, "params_kept": kept}
            self.log[name, rank] = entry
            self.bar.update()
        return float(self.log[name, rank]["score"])

    def _measured(self, name: str, rank: int) -> float:
        undo = replacing.replace(self.working, name, self.bench.spectra[name].factor(rank))
        score = error_or_loss(self.working, self.bench.objective, self.judged_by) - self.dense
        undo()
        return score
