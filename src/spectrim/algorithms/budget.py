"""What layers cost at every rank, and the search for the setting that meets a budget of the whole model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import mul
from typing import Literal

import torch
from torch import Tensor

from spectrim import surgery
from spectrim.algorithms.base import Workbench
from spectrim.cost import layer_macs, parameters
from spectrim.errors import UserError
from spectrim.plan import RankPlan
from spectrim.settings import settings

Measure = Literal["params", "macs"]
BISECTIONS = 60


@dataclass(frozen=True)
class Costs:
    """Parameters, or MACs of one input. ``dense``: of each layer as it is; ``curves``: of its factors at every rank
    from 0; ``total``: of the whole dense model."""

    measure: Measure
    dense: dict[str, float]
    curves: dict[str, Tensor]
    total: float

    def layer(self, name: str, rank: int) -> float:
        """A layer whose factors cost no less than the dense one stays dense."""
        return min(float(self.curves[name][rank]), self.dense[name])

    def share(self, ranks: Mapping[str, int]) -> float:
        """Cost of the whole model over that of the dense one; layers that are not in ``ranks`` are dense."""
        return 1 - sum(self.dense[name] - self.layer(name, rank) for name, rank in ranks.items()) / self.total

    def least(self) -> float:
        """The share that is left with one component in every layer."""
        return self.share(dict.fromkeys(self.dense, 1))

    def require(self, share: float) -> None:
        """Raise ``UserError`` where no plan gets down to ``share``."""
        if share < self.least():
            least = f"{self.least():.4f}"
            raise UserError(f"{self.measure}_kept={share} is out of reach: at rank 1 {least} of them remain")

    def meet(
        self, share: float, ranks_at: Callable[[float], Mapping[str, int]], low: float, high: float
    ) -> dict[str, int]:
        """The ranks at the largest setting between ``low`` and ``high`` that meets ``share`` from below, by bisection.

        ``ranks_at`` must give a model at ``low`` that costs no more than at ``high``. Raises ``UserError`` where even
        that at ``low`` costs more than ``share``.
        """
        self.require(share)
        best, most = dict(ranks_at(low)), dict(ranks_at(high))
        if self.share(most) <= share:
            return most
        if self.share(best) > share:
            least = f"{self.share(best):.4f}"
            raise UserError(f"{self.measure}_kept={share} is out of reach of this rule: {least} remain at the least")
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            ranks = dict(ranks_at(middle))
            if self.share(ranks) <= share:
                low, best = middle, ranks
            else:
                high = middle
        return best


def costs_of(bench: Workbench, measure: Measure) -> Costs:
    """Count them; MACs by running the model's first calibration sample, dense and with one component a layer."""
    if measure == "params":
        dense = {name: float(bench.model.get_submodule(name).weight.numel()) for name in bench.spectra}  # type: ignore[operator]
        each = {name: [1.0] * len(spectrum.sizes(1)) for name, spectrum in bench.spectra.items()}
        total = float(parameters(bench.model))
    else:
        dense, total = layer_macs(bench.model, list(bench.spectra), bench.example)
        each = _macs_of_a_parameter(bench)
    curves = {}
    for name, spectrum in bench.spectra.items():
        ranks = [spectrum.sizes(rank) for rank in range(spectrum.max_rank + 1)]
        curves[name] = torch.tensor([sum(map(mul, each[name], sizes)) for sizes in ranks])
        above = curves[name][spectrum.break_even + 1 :]
        above.clamp_(min=dense[name])  # fewer MACs or not, more parameters than the dense layer are never kept
    return Costs(measure, dense, curves, total)


def _macs_of_a_parameter(bench: Workbench) -> dict[str, list[float]]:
    """Of each factor of each layer: the positions at which a parameter of it is used, the same at every rank."""
    plan = RankPlan.of({name: own.kept(1) for name, own in bench.spectra.items()})
    cut = surgery.apply(bench.model, plan, bench.spectra)
    factors = {name: [f"{name}.{part}" for part, _ in cut.get_submodule(name).named_children()] for name in plan}
    macs, _ = layer_macs(cut, [factor for own in factors.values() for factor in own], bench.example)
    return {
        name: [macs[factor] / size for factor, size in zip(factors[name], own.sizes(1), strict=True)]
        for name, own in bench.spectra.items()
    }


@settings
class Budgeted:
    """``params_kept``, ``macs_kept``: of the whole model, in (0, 1); exactly one of them."""

    params_kept: float | None = 0.5
    macs_kept: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in ("params_kept", "macs_kept") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise UserError(f"set exactly one of params_kept and macs_kept; got {given or 'none'}")
        ((name, value),) = given.items()
        if not 0 < value < 1:
            raise UserError(f"{name} must lie in (0, 1), got {value}")

    def budget(self, bench: Workbench) -> tuple[Costs, float]:
        """What the layers cost in the measure of the budget, and the share of it to be met."""
        if self.params_kept is not None:
            return costs_of(bench, "params"), self.params_kept
        assert self.macs_kept is not None
        return costs_of(bench, "macs"), self.macs_kept


@settings
class MaybeBudgeted(Budgeted):
    """A budget as above, or none of the two: then the rule ends by a criterion of its own."""

    params_kept: float | None = None

    def __post_init__(self) -> None:
        if self.has_budget:
            super().__post_init__()

    @property
    def has_budget(self) -> bool:
        return self.params_kept is not None or self.macs_kept is not None

    def require_one(self, criterion: str) -> None:
        """Raise ``UserError`` unless either a budget or the setting called ``criterion`` is given."""
        if self.has_budget == (getattr(self, criterion) is not None):
            raise UserError(f"set exactly one of params_kept, macs_kept and {criterion}")
