"""Layers in subspaces, their number and ranks set by one bound on the relative error of all layers (ALDS)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.algorithms.rank_selection import singular_values
from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class ALDS(Budgeted):
    """The largest relative error of any layer as small as the budget allows, each layer in its best subspaces.

    ALDS (Liebenwein et al., arXiv 2107.11442, section 3): a layer's input channels are split into k subspaces, each cut
    to the rank j. Its error is ``max_i sigma_(j+1)(W_i) / sigma_1(W)``; as in the authors' code without the sqrt(k)
    with which it bounds that of the whole layer. Globally one error for all layers is found by binary search; locally
    each layer takes the k that reaches it at the least cost.

    The paper alternates the two steps from random k. Ours is one search: at a given error the layers do not depend on
    one another, so the best k of each is known and no start is needed. ``subspaces``: the k to choose from; 1 is always
    among them, and each is fitted to the channels of a layer as ``SubspaceSVD`` says.
    """

    subspaces: Sequence[int] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(count >= 1 for count in self.subspaces):
            raise UserError(f"subspaces must each be at least 1, got {list(self.subspaces)}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find the error and cut. Raises ``UserError`` for another decomposer than ``SVD`` or a budget out of reach."""
        if not isinstance(decomposer, SVD):
            raise UserError(f"ALDS splits the plain SVD into subspaces, not a {type(decomposer).__name__}")
        if decomposer.embeddings:
            raise UserError("ALDS splits the inputs of a layer into subspaces, which the ids of an embedding have not")
        bench, costs, share = self.budget(Workbench.of(model, decomposer, objective))
        splits = {count: SubspaceSVD(count, decomposer.view, decomposer.precision) for count in {1, *self.subspaces}}
        benches = {count: Workbench.of(model, split, objective) for count, split in splits.items()}
        options = {name: [Option(costs.dense[name], 0.0, 1, own.max_rank)] for name, own in bench.spectra.items()}
        for count, other in benches.items():
            curves = self.budget(other)[1].curves
            for name in options.keys() & other.spectra.keys():
                options[name] += _options(name, curves[name], count, bench.spectra[name], other.spectra[name])
        fronts = {name: front(own) for name, own in options.items()}
        curves = {name: torch.tensor([0.0, *(option.cost for option in own)]) for name, own in fronts.items()}

        def places_at(kept: float) -> dict[str, int]:
            return {name: 1 + sum(option.error > 1 - kept for option in own) for name, own in fronts.items()}

        places = replace(costs, curves=curves).meet(share, places_at, low=0.0, high=1.0)
        chosen = {name: fronts[name][place - 1] for name, place in places.items()}
        taken = {name: benches[option.subspaces].spectra[name] for name, option in chosen.items()}
        split = replace(bench, spectra={**bench.spectra, **taken})
        return split.finish({name: option.rank for name, option in chosen.items()})


class Option(NamedTuple):
    """One way to cut a layer: what it then costs, its relative error, the subspaces asked for, the rank in each."""

    cost: float
    error: float
    subspaces: int
    rank: int


def front(options: Iterable[Option]) -> list[Option]:
    """Those than which no other costs less without a larger error: costs rise, errors fall."""
    found: list[Option] = []
    for option in sorted(options):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found


def _options(name: str, costs: Tensor, subspaces: int, whole: Spectrum, split: Spectrum) -> list[Option]:
    """Of layer ``name`` with these ``costs`` of each rank: one for every rank up to break-even."""
    norm = singular_values(name, whole)[0].clamp_min(1e-300)
    errors = [*(singular_values(name, split) / norm).tolist(), 0.0]
    return [Option(float(costs[rank]), errors[rank], subspaces, rank) for rank in range(1, split.break_even + 1)]
