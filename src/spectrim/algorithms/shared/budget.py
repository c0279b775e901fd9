"""What layers cost at every rank, and the search for the setting that meets a budget of the whole model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import mul
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.bisection import bisect
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.best_view import PIVOTED
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.errors import UserError
from spectrim.factored.tied import TiedLinear
from spectrim.surgery import latency, replacing
from spectrim.surgery.cost import layer_macs, parameters
from spectrim.surgery.find_layers import dense_shares
from spectrim.surgery.tied import tied_layers
from spectrim.tools.settings import settings

Measure = Literal["params", "macs", "milliseconds"]
BUDGETS = ("params_kept", "macs_kept", "milliseconds")
STEPS = 60  # of a bisection: the interval that is left is below the precision of a float


@dataclass(frozen=True)
class Costs:
    """What layers cost: parameters, MACs of one input, or milliseconds of one batch.

    A share is the cost of a whole model over that of the dense one. A budget requests one, and ranks achieve one.

    ``dense``: the cost of each layer as it is given.
    ``curves``: the cost of each layer's factors at every rank from 0, shape (R + 1,).
    ``total``: the cost of the whole given model.
    ``fixed``: what the layers save whose rank the user has set.
    ``notes``: what was measured, for the notes of the result.
    ``outside``: which parameters no rank can save, with their shares and the reasons, for an error.
    """

    measure: Measure
    dense: dict[str, float]
    curves: dict[str, Tensor]
    total: float
    fixed: float = 0.0
    notes: tuple[str, ...] = ()
    outside: str = ""

    def layer(self, name: str, rank: int) -> float:
        """Return the cost of layer ``name`` at ``rank``. It stays dense where its factors cost no less."""
        return min(float(self.curves[name][rank]), self.dense[name])

    def achieved(self, ranks: Mapping[str, int]) -> float:
        """Return the share that ``ranks`` achieve. Layers that are not in ``ranks`` are dense."""
        saved = sum(self.dense[name] - self.layer(name, rank) for name, rank in ranks.items())
        return 1 - (saved + self.fixed) / self.total

    def saved(self, name: str) -> Tensor:
        """Return what layer ``name`` saves at each rank from 0, as a share of the whole model. Shape (R + 1,)."""
        return (self.dense[name] - self.curves[name].double()).clamp_min(0) / self.total

    def least(self) -> float:
        """Return the share that is left with one component in every layer."""
        return self.achieved(dict.fromkeys(self.dense, 1))

    def require(self, requested: float) -> None:
        """Raise ``UserError`` where no ranks achieve ``requested``."""
        if requested < self.least():
            outside = f"; of the parameters stay dense {self.outside}" if self.outside else ""
            left = f"at rank 1 {self._left(self.least())} remain"
            raise UserError(f"{self.named(requested)} is out of reach: {left}{outside}")

    def require_of_rule(self, requested: float, least: Mapping[str, int]) -> None:
        """Raise ``UserError`` where ``least``, the smallest ranks that a rule gives, cost more than ``requested``."""
        if self.achieved(least) > requested:
            left = self._left(self.achieved(least))
            raise UserError(f"{self.named(requested)} is out of reach of this rule: {left} remain at the least")

    def of_layers(self, requested: float, layers: Iterable[str]) -> float:
        """Return what ``layers`` may cost together so that the whole model costs the ``requested`` share."""
        elsewhere = self.total - self.fixed - sum(self.dense[name] for name in layers)
        return requested * self.total - elsewhere

    def pays(self, name: str, rank: int) -> bool:
        """Return whether the factors of layer ``name`` cost less than the dense layer."""
        return float(self.curves[name][rank]) < self.dense[name]

    def full(self, name: str) -> int:
        """Return the rank of layer ``name`` at which nothing is dropped, so that it stays dense."""
        return len(self.curves[name]) - 1

    def meet(
        self, requested: float, ranks_at: Callable[[float], Mapping[str, int]], low: float, high: float
    ) -> dict[str, int]:
        """Return the ranks at the largest setting whose share is at most ``requested``, by bisection.

        A layer whose factors cost no less than the dense layer gets its full rank. All layers do where the dense model
        meets the budget.

        ``ranks_at``: the ranks at a setting between ``low`` and ``high``. Those at ``low`` must cost no more than those
            at ``high``.
        Raises ``UserError`` where even the ranks at ``low`` cost more than requested.
        """
        if requested > 1:  # milliseconds beyond those of the dense model
            return {name: self.full(name) for name in self.curves}
        self.require(requested)
        least, most = dict(ranks_at(low)), dict(ranks_at(high))
        if self.achieved(most) <= requested:
            return self._paying(most)
        self.require_of_rule(requested, least)

        def within(setting: float) -> dict[str, int] | None:
            ranks = dict(ranks_at(setting))
            return ranks if self.achieved(ranks) <= requested else None

        found = bisect(within, low, high, STEPS)
        return self._paying(least if found is None else found)

    def named(self, requested: float) -> str:
        """Return the budget as the user wrote it."""
        if self.measure == "milliseconds":
            return f"milliseconds={requested * self.total:.4g}"
        return f"{self.measure}_kept={requested}"

    def _paying(self, ranks: Mapping[str, int]) -> dict[str, int]:
        return {name: rank if self.pays(name, rank) else self.full(name) for name, rank in ranks.items()}

    def _left(self, achieved: float) -> str:
        return f"{achieved * self.total:.4g} ms" if self.measure == "milliseconds" else f"{achieved:.4f} of them"


def costs_of(bench: Workbench, measure: Measure, batch_size: int = 1) -> Costs:
    """Return what the layers of ``bench`` cost.

    MACs are counted by running the first calibration sample, dense and with one component in each layer. Milliseconds
    are measured on batches of ``batch_size`` samples (``latency.measured``); a note says how many.
    """
    if measure == "milliseconds":
        return _timed(bench, batch_size)
    if measure == "params":
        dense = {name: float(bench.params_of(name)) for name in bench.all_spectra}
        each = {name: [1.0] * len(spectrum.sizes(1)) for name, spectrum in bench.all_spectra.items()}
        total = float(parameters(bench.given))
    else:
        dense, total = layer_macs(bench.before, list(bench.all_spectra), bench.example_for("macs_kept"))
        each = _macs_of_a_parameter(bench)
    curves = {}
    for name, spectrum in bench.all_spectra.items():
        numbers = spectrum.multiplied if measure == "macs" else spectrum.sizes
        ranks = [numbers(rank) for rank in range(spectrum.max_rank + 1)]
        curve = torch.tensor([sum(map(mul, each[name], sizes)) for sizes in ranks])
        curves[name] = _to_break_even(curve, spectrum, dense[name])
    return _without_fixed(bench, Costs(measure, dense, curves, total))


def _without_fixed(bench: Workbench, costs: Costs) -> Costs:
    """Return the costs of the layers whose rank is chosen, and what the other layers save at the rank set for them."""
    fixed = sum(costs.dense[name] - costs.layer(name, rank) for name, (_, rank) in bench.fixed.items())
    dense = {name: costs.dense[name] for name in bench.spectra}
    curves = {name: costs.curves[name] for name in dense}
    return replace(costs, dense=dense, curves=curves, fixed=fixed, outside=dense_shares(bench.left, bench.model))


def _timed(bench: Workbench, batch_size: int) -> Costs:
    times = latency.measured(bench.before, bench.all_spectra, bench.example_for("a budget in milliseconds"), batch_size)
    dense = {name: own.dense for name, own in times.layers.items()}
    curves = {
        name: _to_break_even(times.layers[name].curve(spectrum.max_rank), spectrum, dense[name])
        for name, spectrum in bench.all_spectra.items()
    }
    slow = [name for name, curve in curves.items() if float(curve[1]) >= dense[name]]
    note = (
        f"measured at batch size {batch_size}: {times.total:.4g} ms dense, {times.outside:.4g} of them outside of the "
        f"layers; no rank is faster than dense in {len(slow)} of {len(dense)} layers{': ' if slow else ''}"
        + ", ".join(slow)
    )
    return _without_fixed(bench, Costs("milliseconds", dense, curves, times.total, notes=(note,)))


def _to_break_even(curve: Tensor, spectrum: Spectrum, dense: float) -> Tensor:
    """Return ``curve``, raised to ``dense`` above break-even: a layer with more parameters than dense is never kept."""
    curve[spectrum.break_even + 1 :].clamp_(min=dense)
    return curve


def _macs_of_a_parameter(bench: Workbench) -> dict[str, list[float]]:
    """Return, for each factor of each layer, how often one of its parameters is used. It is the same at every rank."""
    spectra = {name: spectrum.plain() for name, spectrum in bench.all_spectra.items()}
    plan = replacing.plan_of(spectra, dict.fromkeys(spectra, 1))
    cut = replacing.apply(bench.model, plan, spectra, shared=True)
    factors = {name: _uses_of_factors(cut, name) for name in plan}
    used = [use for own in factors.values() for uses in own for use in uses]
    macs, _ = layer_macs(cut, used, bench.example_for("macs_kept"))
    return {
        name: [sum(macs[use] for use in uses) / size for uses, size in zip(factors[name], own.sizes(1), strict=True)]
        for name, own in spectra.items()
    }


def _uses_of_factors(model: nn.Module, name: str) -> list[list[str]]:
    """Return, for each factor of layer ``name``, the modules that hold its parameters, by their names in ``model``."""
    parts, others = [part for part, _ in model.get_submodule(name).named_children()], tied_layers(model).get(name, ())
    uses = [[f"{name}.{part}"] for part in parts]
    for other in others:
        turned = {"first": "second", "second": "first"} if isinstance(model.get_submodule(other), TiedLinear) else {}
        for part, own in zip(parts, uses, strict=True):
            own.append(f"{other}.{turned.get(part, part)}")
    return uses


@settings
class Budgeted:
    """A budget of the whole model. Exactly one of the first three is set.

    ``params_kept``: the part of the dense model's parameters, in (0, 1).
    ``macs_kept``: the part of its MACs, in (0, 1).
    ``milliseconds``: of one forward pass of ``batch_size`` samples, above 0. All layers are timed on this machine
        first. No layer is cut to a rank at which it is no faster than dense. The model stays dense if it meets the
        budget as it is, and if the compressed one, timed beside it, is no faster.
    """

    params_kept: float | None = 0.5
    macs_kept: float | None = None
    milliseconds: float | None = None
    batch_size: int = 1

    decomposer: ClassVar[Decomposer] = PIVOTED  # where the user names none

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            raise UserError(f"set exactly one of {', '.join(BUDGETS)}; got {given or 'none'}")
        check_budget(given, self.batch_size)

    def budget(self, bench: Workbench) -> tuple[Workbench, Costs, float]:
        """Return the workbench, the costs in the measure of the budget, and the share requested (``budget_of``)."""
        return budget_of(bench, self.params_kept, self.macs_kept, self.milliseconds, self.batch_size)


@settings
class MaybeBudgeted(Budgeted):
    """A budget as above, or none. Without a budget the algorithm ends by a criterion of its own."""

    params_kept: float | None = None

    def __post_init__(self) -> None:
        if self.has_budget:
            super().__post_init__()

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BUDGETS)

    def budget_or_params(self, bench: Workbench) -> tuple[Workbench, Costs, float | None]:
        """Return what ``budget`` does. Without a budget the costs are parameters, and no share is requested."""
        return self.budget(bench) if self.has_budget else (bench, costs_of(bench, "params"), None)

    def require_one(self, criterion: str) -> None:
        """Raise ``UserError`` unless either a budget or the setting called ``criterion`` is given."""
        if self.has_budget == (getattr(self, criterion) is not None):
            raise UserError(f"set exactly one of {', '.join(BUDGETS)} and {criterion}")


def check_budget(given: Mapping[str, float], batch_size: int) -> None:
    """Raise ``UserError`` for a budget out of range. ``given``: the budgets by name."""
    for name, value in given.items():
        if name == "milliseconds" and not value > 0:
            raise UserError(f"milliseconds must be above 0, got {value}")
        if name != "milliseconds" and not 0 < value < 1:
            raise UserError(f"{name} must lie in (0, 1), got {value}; 0.5 keeps a half")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")


def budget_of(
    bench: Workbench, params_kept: float | None, macs_kept: float | None, milliseconds: float | None, batch_size: int
) -> tuple[Workbench, Costs, float]:
    """Return the workbench, the costs in the measure of the one budget that is given, and the share requested.

    For a budget in milliseconds the workbench is a new one that holds the batch size and what was measured.
    """
    if params_kept is not None:
        return bench, costs_of(bench, "params"), params_kept
    if macs_kept is not None:
        return bench, costs_of(bench, "macs"), macs_kept
    assert milliseconds is not None
    costs = costs_of(bench, "milliseconds", batch_size)
    return replace(bench, notes=(*bench.notes, *costs.notes), timed_at=batch_size), costs, milliseconds / costs.total
