"""Measure how well the first order predicts the loss, one layer and one rank at a time."""

from collections.abc import Sequence

from torch import nn

from spectrim.algorithms.shared.measurement import Readings
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied
from spectrim.tools.live import Bar
from spectrim.tools.settings import require_parts, settings


@settings
class Probe:
    """Truncate each layer alone, at each of ``ratios`` of its full rank, and measure the loss (S1, Lemmas 1-3).

    Every row of the readings belongs to one layer at one rank. It holds the relative error of the weight and the
    largest absolute change of an entry. Beside them are the predicted first-order change of the calibration loss and
    the measured one.
    """

    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 0.97)

    def __post_init__(self) -> None:
        require_parts("ratios", self.ratios)

    def measure(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Readings:
        """Return one row for each layer and rank. The model stays as it is."""
        bench = Workbench.of(model, decomposer, objective)
        predicted = bench.first_order()
        working = copied(bench.model)
        dense_loss = objective.evaluate(working).loss
        rows: list[dict] = []
        for name, spectrum in Bar(bench.spectra.items(), "probe", unit="layer", leave=False):
            for rank in sorted({max(1, round(ratio * spectrum.max_rank)) for ratio in self.ratios}):
                undo = replacing.replace(working, name, spectrum.factor(rank))
                rows.append(
                    {
                        "layer": name,
                        "rank": rank,
                        "relative_error": float(spectrum.relative_error()[rank]),
                        "max_abs_error": float(spectrum.largest_entry()[rank]),
                        "predicted": float(predicted[name][rank]) if name in predicted else 0.0,
                        "measured": objective.evaluate(working).loss - dense_loss,
                        "split": "calibration",
                    }
                )
                undo()
        return Readings(rows, [*bench.notes])
