"""Not a selector but a measurement: how well the first order predicts the loss, one layer and one rank at a time."""

import copy
from collections.abc import Sequence

from torch import nn
from tqdm import tqdm

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools.settings import settings


@settings
class Probe:
    """Truncate each layer alone, at each of the ``ratios`` of its full rank, and measure (S1, Lemmas 1-3).

    The log holds, for every (layer, rank): relative and largest absolute error of the weight, the predicted
    first-order change of the loss and the measured one, both on the calibration split. The model is returned dense.
    """

    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 0.97)

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise UserError(f"ratios, parts of the full rank, must lie in (0, 1), got {list(self.ratios)}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure; nothing is compressed."""
        bench = Workbench.of(model, decomposer, objective)
        predicted = bench.first_order()
        working = copy.deepcopy(model)
        dense_loss = objective.evaluate(working).loss
        log: list[dict] = []
        for name, spectrum in tqdm(bench.spectra.items(), "probe", unit="layer", leave=False, disable=None):
            dense_layer = working.get_submodule(name)
            for rank in sorted({max(1, round(ratio * spectrum.max_rank)) for ratio in self.ratios}):
                replacing.replace(working, name, spectrum.factor(rank))
                log.append(
                    {
                        "layer": name,
                        "rank": rank,
                        "relative_error": float(spectrum.relative_error()[rank]),
                        "max_abs_error": float(spectrum.largest_entry()[rank]),
                        "predicted": float(predicted[name][rank]),
                        "measured": objective.evaluate(working).loss - dense_loss,
                        "split": "calibration",
                    }
                )
            replacing.replace(working, name, dense_layer)
        return bench.finish({}, log)
