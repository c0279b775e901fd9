"""Cut every layer by one rule, without looking at the loss: truncation, the baseline."""

from functools import partial
from typing import Literal

from torch import nn

from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.work import Outlook, Work
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings

RULES = ("rank", "ratio", "energy", "params_kept")


@settings
class Truncation:
    """Cut every layer by one of four rules. Exactly one is set.

    ``rank``: the rank of every layer.
    ``ratio``: the part of its parameters that every factored layer keeps, in (0, 1].
    ``energy``: every layer takes the smallest rank that keeps this part of its squared singular values, in (0, 1].
    ``params_kept``: the part of the whole model's parameters that is kept, in (0, 1]. The largest common ``ratio`` or
        ``energy`` that fits is taken.
    ``common``: which of the two, where ``params_kept`` is set.

    A layer stays dense where its rank would lie above break-even.
    """

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    params_kept: float | None = None
    common: Literal["ratio", "energy"] = "ratio"

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in RULES if getattr(self, name) is not None}
        if len(given) != 1:
            raise UserError(f"truncation takes exactly one of {', '.join(RULES)}; got {given or 'none'}")
        ((name, value),) = given.items()
        if name == "rank" and value < 1:
            raise UserError(f"rank must be at least 1, got {value}")
        if name != "rank" and not 0 < value <= 1:
            raise UserError(f"{name} must lie in (0, 1], got {value}")
        if self.common != "ratio" and name != "params_kept":
            raise UserError(f"common={self.common} goes with params_kept alone, got {name}={value}; leave common out")

    def work(self, outlook: Outlook) -> Work:
        """Return the work: nothing but decompositions."""
        return Work(rank=self.rank, ratio=self.ratio, params_kept=self.params_kept)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Cut every layer by the rule. Raises ``UserError`` for a rank that no layer has, or a budget out of reach."""
        bench = Workbench.of(model, decomposer, objective)
        if self.rank is not None:
            largest = max(spectrum.max_rank for spectrum in bench.spectra.values())
            if self.rank > largest:
                raise UserError(f"rank {self.rank} is above the full rank of every layer (at most {largest})")
            return bench.finish(dict.fromkeys(bench.spectra, self.rank))
        if self.energy is not None:
            return bench.finish(_ranks_of_energy(bench, self.energy))
        if self.ratio is not None:
            return bench.finish(_ranks_of_ratio(bench, self.ratio))
        assert self.params_kept is not None
        costs = costs_of(bench, "params")
        ranks_of = _ranks_of_ratio if self.common == "ratio" else _ranks_of_energy
        return bench.finish(costs.meet(self.params_kept, partial(ranks_of, bench), low=0.0, high=1.0))


def _ranks_of_ratio(bench: Workbench, ratio: float) -> dict[str, int]:
    ranks = {}
    for name, spectrum in bench.spectra.items():
        ranks[name] = max(1, spectrum.rank_within(ratio * bench.params_of(name)))
    return ranks


def _ranks_of_energy(bench: Workbench, energy: float) -> dict[str, int]:
    return {name: rank_of_energy(spectrum, energy) for name, spectrum in bench.spectra.items()}


def rank_of_energy(spectrum: Spectrum, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps the part ``energy`` of a layer's squared singular values."""
    dropped = spectrum.error().square()
    enough = dropped <= (1 - energy) * dropped[0] + 1e-12 * dropped[0]
    return max(1, int(enough.nonzero()[0]))
