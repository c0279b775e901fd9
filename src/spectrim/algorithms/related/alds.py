"""Split layers into subspaces, and choose subspaces and ranks by one bound on the relative error of all layers (ALDS).

ALDS (Liebenwein et al., arXiv 2107.11442, section 3): the input channels of a layer are split into k subspaces, and
each is cut to rank j. The error of the layer is ``max_i sigma_(j+1)(W_i) / sigma_1(W)``. A binary search finds the
smallest error that all layers can meet within the budget. At that error each layer takes the k that costs least.

What differs here:

- The paper alternates the two steps from a random k. At a given error the layers do not depend on one another, so the
  best k of each is known. One search is enough, and needs no start.
- The paper bounds the error of the whole layer by sqrt(k) times that above. The factor is left out, as in the authors'
  code.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.algorithms.rank_selection import singular_values
from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.trained import plain_svd
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class ALDS(Budgeted):
    """Make the largest relative error of any layer as small as the budget allows, each layer in its best subspaces.

    ``subspaces``: the numbers of subspaces to choose from. 1 is always among them. ``SubspaceSVD`` fits each number to
        the channels of a layer.
    """

    subspaces: Sequence[int] = (1, 2, 4, 8)

    decomposer: ClassVar[Decomposer] = SVD()  # the only one that it takes

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(count >= 1 for count in self.subspaces):
            raise UserError(f"subspaces must each be at least 1, got {list(self.subspaces)}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find the error and cut. Raises ``UserError`` for a decomposer other than ``SVD`` or a budget out of reach."""
        decomposer = plain_svd(decomposer, "ALDS")
        if decomposer.embeddings:
            raise UserError("ALDS cannot split embeddings into subspaces: use a decomposer with embeddings=false")
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        benches, curves_of = {1: bench}, {1: costs.curves}  # one subspace is the whole layer
        for count in sorted(set(self.subspaces) - {1}):
            benches[count] = bench.decomposed_by(SubspaceSVD(count, decomposer.view, decomposer.precision))
            curves_of[count] = self.budget(benches[count])[1].curves
        options = {name: [Option(costs.dense[name], 0.0, 1, own.max_rank)] for name, own in bench.spectra.items()}
        for count, other in benches.items():
            curves = curves_of[count]
            for name in options.keys() & other.spectra.keys():
                options[name] += _options(name, curves[name], count, bench.spectra[name], other.spectra[name])
        fronts = {name: front(own) for name, own in options.items()}
        curves = {name: torch.tensor([0.0, *(option.cost for option in own)]) for name, own in fronts.items()}

        def places_at(kept: float) -> dict[str, int]:
            return {name: 1 + sum(option.error > 1 - kept for option in own) for name, own in fronts.items()}

        places = replace(costs, curves=curves).meet(requested, places_at, low=0.0, high=1.0)
        chosen = {name: fronts[name][place - 1] for name, place in places.items()}
        taken = {name: benches[option.subspaces].spectra[name] for name, option in chosen.items()}
        split = replace(bench, spectra=MappingProxyType({**bench.spectra, **taken}))
        return split.finish({name: option.rank for name, option in chosen.items()})


class Option(NamedTuple):
    """Describe one way to cut a layer: its cost, its relative error, its number of subspaces and the rank in each."""

    cost: float
    error: float
    subspaces: int
    rank: int


def front(options: Iterable[Option]) -> list[Option]:
    """Return the options that no other option beats in both cost and error. Costs rise, errors fall."""
    found: list[Option] = []
    for option in sorted(options):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found


def _options(name: str, costs: Tensor, subspaces: int, whole: Spectrum, split: Spectrum) -> list[Option]:
    """Return an option for every rank of layer ``name`` up to break-even. ``costs``: at each rank."""
    norm = singular_values(name, whole)[0].clamp_min(1e-300)
    errors = [*(singular_values(name, split) / norm).tolist(), 0.0]
    return [Option(float(costs[rank]), errors[rank], subspaces, rank) for rank in range(1, split.break_even + 1)]
