"""Reserve a part of a uniform rank for every layer, and share out the rest by importance and error (Swift-SVD).

Swift-SVD (Qi et al., ICML 2026, arXiv 2604.01609): a layer of one type, such as a query projection, keeps half of its
uniform rank. The other halves are shared out in proportion to ``I^a (log(1 + E))^(1-a)``. I is the importance of the
layer, and E the norm of its outputs on calibration data. The paper finds that without the reserve the allocation is
worse than a uniform one.

What differs here:

- I comes from the KL divergence when this layer alone is cut to a part ``point`` of its parameters, scaled to 1 to 2
  within its type. The paper takes a score for each block from another tool.
- The paper finds a by a search. Here it is a setting.
- The decomposition is ``WhitenedSVD``, whose truncations have the same outputs. The paper takes it from an
  eigendecomposition of the covariance of the outputs, as ``WhitenedSVD`` does for large layers.
- The compression of key-value caches is left out.
"""

import math
from typing import ClassVar

from torch import nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.divergence import divergences
from spectrim.algorithms.shared.layer_types import by_type
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import require_parts, settings


@settings
class SwiftSVD(Budgeted):
    """Give every layer a part of its uniform rank, and the rest to the important layers of its type.

    ``reserve``: in [0, 1]; the part of the uniform rank that every layer keeps. 1 is the uniform allocation.
    ``weight``: in [0, 1]; the exponent a. 1 goes by importance alone, 0 by the norm of the outputs.
    ``point``: in (0, 1); the part of its parameters at which the importance of a layer is measured.
    ``samples``: number of calibration samples for the importance.
    """

    reserve: float = 0.5
    weight: float = 0.5
    point: float = 0.3
    samples: int = 100

    decomposer: ClassVar[Decomposer] = WhitenedSVD("channel")  # where the user names none

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reserve", "weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        require_parts("point", [self.point])
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure, allocate and cut. Raises ``UserError`` for a budget out of reach, or outputs that are no scores."""
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        types, scores = by_type(bench.model, bench.spectra), self._scores(bench)

        def ranks_at(ratio: float) -> dict[str, int]:
            found: dict[str, int] = {}
            for group in types:
                uniform = {name: bench.spectra[name].rank_within(ratio * bench.params_of(name)) for name in group}
                kept = {name: math.floor(self.reserve * rank) for name, rank in uniform.items()}
                free, total = sum(uniform.values()) - sum(kept.values()), sum(scores[name] for name in group)
                for name in group:
                    share = scores[name] / total if total else 1 / len(group)
                    rank = kept[name] + math.floor(free * share + 1e-9)
                    found[name] = min(max(rank, 1), bench.spectra[name].max_rank)
            return found

        return bench.finish(costs.meet(requested, ranks_at, low=0.0, high=1.0))

    def _scores(self, bench: Workbench) -> dict[str, float]:
        """Return ``I^a (log(1 + E))^(1-a)`` of each layer, with I from 1 to 2 within its type."""
        ranks = {name: bench.rank_at(name, self.point) for name in bench.spectra}
        moved, scores = divergences(bench, ranks, self.samples), {}
        for group in by_type(bench.model, bench.spectra):
            low, high = min(moved[name] for name in group), max(moved[name] for name in group)
            for name in group:
                importance = 1 + ((moved[name] - low) / (high - low) if high > low else 0.0)
                error = math.log1p(float(bench.spectra[name].weighted_error()[0]))
                scores[name] = importance**self.weight * error ** (1 - self.weight)
        return scores
