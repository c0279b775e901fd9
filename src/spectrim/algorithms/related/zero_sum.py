"""Remove components of all layers by their signed first-order change, whose running sum is held near zero (ZS-SVD).

ZS-SVD (Abbasi et al., ICML 2026, arXiv 2602.02848): the first-order change of the loss without a component has a sign.
In each layer the component with the smallest singular value goes first. Of the candidates of all layers that have the
sign opposite to the sum so far, the one with the smallest absolute change is removed. Where no candidate has this sign,
the smallest one of the other sign goes. So the first-order change of the whole model stays near zero.

What differs here: any decomposer and any form of factors may be used; the paper whitens as SVD-LLM does. The gradient
is taken once. The projected-gradient step after each cut, the repeated cuts, and the 8-bit remapping are left out.
"""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import ClassVar, NamedTuple

from torch import nn

from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.statistics.gate_rows import OUTSIDE
from spectrim.statistics.objective import Objective
from spectrim.surgery.find_layers import left_dense
from spectrim.tools.settings import settings


@settings
class ZeroSum(Budgeted):
    """Remove components whose first-order changes cancel, until the budget is met. It needs labels."""

    decomposer: ClassVar[Decomposer] = WhitenedSVD("channel")  # where the user names none

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Order the components and cut. The log holds the predicted change and the largest sum on the way.

        Both are those of the removals that are made: a layer that would not get smaller stays dense. Raises
        ``UserError`` for a budget out of reach.
        """
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        curves = {name: curve.tolist() for name, curve in bench.first_order().items() if name in bench.spectra}
        removals = in_order(curves)
        full = {name: len(curve) - 1 for name, curve in curves.items()}

        def ranks_at(setting: float) -> dict[str, int]:
            return full | {one.layer: one.rank for one in removals[: round((1 - setting) * len(removals))]}

        ranks = costs.meet(requested, ranks_at, low=0.0, high=1.0)
        outside = [name for name in bench.spectra if name not in curves]
        notes = left_dense(dict.fromkeys(outside, OUTSIDE), bench.model)
        sums = list(accumulate(one.change for one in removals if one.rank >= ranks[one.layer]))
        log = [{"predicted": sums[-1], "largest_sum": max(map(abs, sums))}] if sums else []
        return bench.finish(ranks, log, notes)


class Removal(NamedTuple):
    """The removal of one component.

    ``rank``: of its layer, after it. ``change``: the first-order change. ``total``: of all removals up to this one.
    """

    layer: str
    rank: int
    change: float
    total: float


def in_order(curves: Mapping[str, Sequence[float]]) -> list[Removal]:
    """Return all removals down to rank 1, in order. ``curves``: the first-order change of each layer at every rank."""

    def candidate(layer: str, rank: int) -> tuple[float, str, int, float]:
        change = curves[layer][rank - 1] - curves[layer][rank]
        return abs(change), layer, rank - 1, change

    rising: list[tuple[float, str, int, float]] = []
    falling: list[tuple[float, str, int, float]] = []
    for layer, curve in curves.items():
        if len(curve) > 2:
            first = candidate(layer, len(curve) - 1)
            (falling if first[3] < 0 else rising).append(first)
    heapify(rising)
    heapify(falling)
    found, total = list[Removal](), 0.0
    while rising or falling:
        wanted, other = (rising, falling) if total <= 0 else (falling, rising)
        _, layer, rank, change = heappop(wanted or other)
        total += change
        found.append(Removal(layer, rank, change, total))
        if rank > 1:
            following = candidate(layer, rank)
            heappush(falling if following[3] < 0 else rising, following)
    return found
