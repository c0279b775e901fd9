"""Joint: which singular components to remove, over all layers together, to second order."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim import surgery
from spectrim.algorithms.base import Compressed, Workbench
from spectrim.algorithms.budget import BUDGETS, Costs, budget_of, check_budget, costs_of
from spectrim.algorithms.removal import Gated, remove
from spectrim.batchnorm import copy_statistics, reestimate
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.gates import GateGradients, gate_gradients
from spectrim.objective import Objective
from spectrim.plan import Kept, RankPlan
from spectrim.settings import settings

SMALLEST_STEP = 1 / 64  # of the dense cost: where a search by tolerance ends


@settings
class Joint:
    """Remove the components whose predicted change of the loss per saved cost is lowest, wherever they are.

    The prediction is to second order in gates on all components (``removal``), taken anew from ``samples`` calibration
    samples at the partly compressed model after each ``step``, a part of the dense cost. The target is exactly one of

    ``params_kept``, ``macs_kept``: of the whole model, in (0, 1), met from below;
    ``milliseconds``, above 0: of one forward pass of ``batch_size`` samples, as predicted by the times of all layers
    measured on this machine first; no layer is left in a form that was not faster than dense;
    ``max_loss_increase``, at least 0: as few parameters as possible with the loss on the ``verification`` split, which
    no gradient comes from, at most this much above the dense model's.

    ``trust``: the part of the first order that is believed, in [0, 1]; null: as much as one half of the calibration
    samples says of the other. ``batch_norm``: whether BatchNorm statistics follow the compression (no labels used).
    """

    params_kept: float | None = None
    macs_kept: float | None = None
    milliseconds: float | None = None
    max_loss_increase: float | None = None
    step: float = 0.1
    batch_size: int = 1
    samples: int = 2000
    trust: float | None = None
    batch_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) + (self.max_loss_increase is not None) != 1:
            raise UserError(f"joint takes exactly one of {', '.join(BUDGETS)}, max_loss_increase")
        check_budget(given, self.batch_size)
        if self.max_loss_increase is not None and not self.max_loss_increase >= 0:
            raise UserError(f"max_loss_increase must be at least 0, got {self.max_loss_increase}")
        if not 0 < self.step < 1:
            raise UserError(f"step must lie in (0, 1), got {self.step}")
        if self.trust is not None and not 0 <= self.trust <= 1:
            raise UserError(f"trust must lie in [0, 1], got {self.trust}")
        if self.samples < 2:
            raise UserError(f"samples must be at least 2, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select components and cut. Raises ``UserError`` for a budget out of reach or no verification split."""
        bench = Workbench(model, decomposer, objective)
        if self.max_loss_increase is not None:
            search = _Search(self, bench, costs_of(bench, "params"))
            search.to_tolerance(self.max_loss_increase)
            return search.finish()
        costs, share = budget_of(bench, self.params_kept, self.macs_kept, self.milliseconds, self.batch_size)
        search = _Search(self, bench, costs)
        search.to_budget(share)
        return search.finish()


@dataclass
class _Point:
    """Where a search stands: the components still there of every layer, and the BatchNorm statistics that fit."""

    kept: dict[str, Tensor]
    base: nn.Module
    predicted: float = 0.0


class _Search:
    def __init__(self, chosen: Joint, bench: Workbench, costs: Costs) -> None:
        self.settings, self.bench, self.costs = chosen, bench, costs
        everything = {name: torch.arange(spectrum.max_rank) for name, spectrum in bench.spectra.items()}
        self.point = _Point(everything, bench.model)
        self.log: list[dict] = []

    def to_budget(self, target: float) -> None:
        self.costs.require(target)
        reached = 1.0
        with tqdm(desc="joint", total=max(0, round(100 * (1 - target))), unit="%", leave=False, disable=None) as bar:
            while reached > target:
                reached = max(target, reached - self.settings.step)
                self.point = self._advance(self.point, reached)
                bar.update(round(100 * (1 - reached)) - bar.n)

    def to_tolerance(self, increase: float) -> None:
        """Step down until the verified loss is too high, then again from the last good point with half the step."""
        objective, step = self.bench.objective, self.settings.step
        dense = objective.evaluate(self.bench.model, "verification").loss
        reached = 1.0
        while step >= SMALLEST_STEP:
            wanted = reached - step
            candidate = self._advance(self.point, wanted) if wanted > 0 else None
            loss = None if candidate is None else objective.evaluate(self._cut(candidate), "verification").loss
            passed = loss is not None and loss <= dense + increase
            self.log.append(
                {"share": wanted, "verified_change": None if loss is None else loss - dense, "passed": passed}
            )
            if candidate is not None and passed:
                self.point, reached = candidate, self._share(candidate)
            else:
                step /= 2

    def _advance(self, point: _Point, share: float) -> _Point:
        """Linearise at ``point`` and remove until ``share`` of the dense cost is left."""
        spectra, names = self.bench.spectra, list(point.kept)
        everything = RankPlan.of({n: Kept(tuple(point.kept[n].tolist()), spectra[n].form) for n in names})
        factored = surgery.apply(point.base, everything, spectra)
        rows = gate_gradients(factored, names, self.bench.objective, self.settings.samples, seed=self.settings.seed)
        trust = evidence(rows) if self.settings.trust is None else self.settings.trust
        layers = {}
        for name, row in rows.items():
            curve = self.costs.curves[name][: len(point.kept[name]) + 1]
            layers[name] = Gated(row.drawn, trust * row.given.mean(0), curve, self.costs.dense[name])
        elsewhere = self.costs.total - sum(self.costs.dense.values())
        removal = remove(layers, share * self.costs.total - elsewhere)
        after = _Point(
            {n: point.kept[n][removal.kept[n]] for n in names}, point.base, point.predicted + removal.predicted
        )
        self.log.append({"share": self._share(after), "trust": trust, "predicted": removal.predicted})
        if self.settings.batch_norm:
            self._follow(after)
        return after

    def _follow(self, point: _Point) -> None:
        """Give ``point`` the BatchNorm statistics of what it is cut to."""
        cut = surgery.apply(self.bench.model, self._plan(point), self.bench.spectra)
        reestimate(cut, self.bench.model, self.bench.objective, self.settings.samples)
        point.base = deepcopy(self.bench.model)
        copy_statistics(cut, point.base)

    def _plan(self, point: _Point) -> RankPlan:
        """What pays: a layer whose components cost no less than the dense layer stays dense."""
        pays = {name: kept for name, kept in point.kept.items() if self.costs.pays(name, len(kept))}
        return RankPlan.of({n: Kept(tuple(kept.tolist()), self.bench.spectra[n].form) for n, kept in pays.items()})

    def _cut(self, point: _Point) -> nn.Module:
        return surgery.apply(point.base, self._plan(point), self.bench.spectra)

    def _share(self, point: _Point) -> float:
        return self.costs.share({name: len(kept) for name, kept in point.kept.items()})

    def finish(self) -> Compressed:
        compressed = self.bench.finish({name: kept.keep for name, kept in self._plan(self.point).items()}, self.log)
        copy_statistics(self.point.base, compressed.model)
        return compressed


def evidence(rows: Mapping[str, GateGradients]) -> float:
    """How much of the first order one half of the samples predicts of the other: a regression slope, in [0, 1]."""
    slopes = torch.cat([row.given.double() for row in rows.values()], 1)
    first, second = slopes[::2].mean(0), slopes[1::2].mean(0)
    size = (first.square().sum() + second.square().sum()) / 2
    return float((first @ second / size).clamp(0, 1)) if size > 0 else 0.0
