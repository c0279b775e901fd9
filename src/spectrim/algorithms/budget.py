"""What layers cost at every rank, and the search for the setting that meets a budget of the whole model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spectrim import surgery
from spectrim.algorithms.base import Workbench
from spectrim.cost import layer_macs
from spectrim.errors import UserError
from spectrim.plan import Kept, RankPlan

Measure = Literal["params", "macs"]
BISECTIONS = 60


@dataclass(frozen=True)
class Costs:
    """Parameters, or MACs of one input. ``dense``: of each layer as it is; ``curves``: of its factors at every rank
    from 0; ``total``: of the whole dense model."""

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
            raise UserError(f"{share} is out of reach: with one component a layer {self.least():.4f} remain")

    def meet(
        self, share: float, ranks_at: Callable[[float], Mapping[str, int]], low: float, high: float
    ) -> dict[str, int]:
        """The ranks at the setting between ``low`` and ``high`` that meets ``share`` from below, by bisection.

        ``ranks_at`` must give a model at ``low`` that costs no more than at ``high``. Raises ``UserError`` where even
        that at ``low`` costs more than ``share``.
        """
        self.require(share)
        best = dict(ranks_at(low))
        if self.share(best) > share:
            raise UserError(f"{share} is out of reach of this rule: {self.share(best):.4f} remain at the least")
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
        one = {name: float(spectrum.cost(1)) for name, spectrum in bench.spectra.items()}
        total = float(sum(parameter.numel() for parameter in bench.model.parameters()))
    else:
        plan = RankPlan.of({name: Kept(1, spectrum.form) for name, spectrum in bench.spectra.items()})
        one, _ = layer_macs(surgery.apply(bench.model, plan, bench.spectra), list(bench.spectra), bench.example)
        dense, total = layer_macs(bench.model, list(bench.spectra), bench.example)
    curves = {}
    for name, spectrum in bench.spectra.items():
        curves[name] = one[name] * torch.arange(spectrum.max_rank + 1)
        above = curves[name][spectrum.break_even + 1 :]
        above.clamp_(min=dense[name])  # fewer MACs or not, more parameters than the dense layer are never kept
    return Costs(dense, curves, total)


def target(**targets: float | None) -> tuple[str, float]:
    """The one of several budgets that is set. Raises ``UserError`` for none, several, or one outside (0, 1)."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise UserError(f"set exactly one of {', '.join(targets)}; got {given or 'none'}")
    ((name, value),) = given.items()
    if not 0 < value < 1:
        raise UserError(f"{name} must lie in (0, 1), got {value}")
    return name, value
