"""Cut every layer as far as one tolerance on the loss allows, with that layer alone cut (ASVD's rank search).

ASVD (arXiv 2312.05821), sensitivity-based truncation rank search: the calibration loss is measured with one layer at
each of ``ratios`` of its parameters and all others dense. A binary search finds the tolerance that meets the budget.

What differs here:

- Convolutions are cut too.
- A measured rise that is not monotone is replaced by its running maximum, towards smaller ratios.
- The paper scales weights by absolute activations. Later work replaced that by whitening, which is a decomposer here.
"""

from bisect import bisect_right
from collections.abc import Sequence

from torch import nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied
from spectrim.tools.content import of_state
from spectrim.tools.live import Bar
from spectrim.tools.settings import require_parts, settings


@settings
class Sensitivity(Budgeted):
    """Cut each layer to the smallest rank that, by itself, raises the loss by no more than one tolerance.

    ``ratios``: in (0, 1); the parts of a layer's parameters at which it is measured.
    """

    ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_parts("ratios", self.ratios)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure, search and cut. The measurements are remembered for a sweep over budgets.

        The log holds each measurement: layer, rank and change of the calibration loss. Raises ``UserError`` for a
        budget out of reach of the ratios.
        """
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        log = objective.remembered(
            model,
            "sensitivity",
            lambda: (decomposer, tuple(self.ratios), of_state(model)),
            lambda: self._measure(bench),
        )
        risen: dict[str, list[tuple[float, int]]] = {}
        for entry in log:  # the ranks of a layer fall
            known = risen.setdefault(entry["layer"], [])
            known.append((max(entry["change"], known[-1][0]) if known else entry["change"], entry["rank"]))
        tolerances = sorted({change for known in risen.values() for change, _ in known})

        def ranks_at(place: float) -> dict[str, int]:
            """Return the ranks at a tolerance that falls from the largest rise measured (0) to the smallest (1)."""
            allowed = tolerances[min(len(tolerances) - 1, int((1 - place) * len(tolerances)))]
            within = {
                layer: bisect_right(known, (allowed, bench.spectra[layer].max_rank)) for layer, known in risen.items()
            }
            return {layer: risen[layer][count - 1][1] for layer, count in within.items() if count}

        return bench.finish(costs.meet(requested, ranks_at, low=0.0, high=1.0), [*log])

    def _measure(self, bench: Workbench) -> list[dict]:
        working = copied(bench.model)
        dense = bench.objective.evaluate(working).loss
        log: list[dict] = []
        for name, spectrum in Bar(bench.spectra.items(), "sensitivity", unit="layer", leave=False):
            weight = bench.model.get_submodule(name).weight.numel()  # type: ignore[operator]
            ranks = {max(1, spectrum.rank_within(ratio * weight)) for ratio in self.ratios}
            for rank in sorted((rank for rank in ranks if rank <= spectrum.break_even), reverse=True):
                undo = replacing.replace(working, name, spectrum.factor(rank))
                log.append({"layer": name, "rank": rank, "change": bench.objective.evaluate(working).loss - dense})
                undo()
        return log
