"""Joint: which singular components to remove, over all layers together, to second order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.budget import BUDGETS, Costs, budget_of, check_budget, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.removal import Gated, remove
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, content
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.refit.factors import refit
from spectrim.statistics import paired_loss
from spectrim.statistics.fisher import Gates, gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools.settings import settings

SMALLEST_STEP = 1 / 64  # of the dense cost: where a search by tolerance ends
CAUTION = 2.0  # standard errors: of some ten models that a search tries it takes the smallest, not the luckiest
ROUNDING = 1e-9  # of a step: what it leaves of the way to the budget needs no step of its own


@settings
class Joint:
    """Remove the components whose predicted change of the loss per saved cost is lowest, wherever they are.

    The prediction is to second order in gates on all components (``removal``), taken anew from ``samples`` calibration
    samples at the partly compressed model after each ``step``, a part of the dense cost. The target is exactly one of

    ``params_kept``, ``macs_kept``: of the whole model, in (0, 1), met from below;
    ``milliseconds``, above 0: of one forward pass of ``batch_size`` samples, as predicted by the times of all layers
    measured on this machine first; no layer is left in a form that was not faster than dense, nor is the whole model;
    ``max_loss_increase``, at least 0: as few parameters as possible with the loss on the ``verification`` split, which
    no gradient comes from, at most this much above the dense model's, and that with certainty: the mean change over
    the samples and two standard errors of it. The more samples are there, the more can be taken away.

    ``refit``: the calibration samples by which the factors that are left are fitted to the outputs of the dense layers
    (``factors.refit``); 0: they stay as cut. For a model of class scores neither part looks at a label.

    Two parts of the expansion are left out unless asked for, as measuring them takes more than some hundred images
    (Table 9). ``significance``: take the first order too, each slope shrunk by so many standard errors over the samples
    (``significant``), 0: as it is; a decoder is not at a minimum of its loss on other texts, and some slopes are beyond
    chance (Table 3). ``interaction``, in [0, 1]: the part of what removed components do to one another, the entries of
    the Fisher information off its diagonal, that is believed.
    """

    params_kept: float | None = None
    macs_kept: float | None = None
    milliseconds: float | None = None
    max_loss_increase: float | None = None
    step: float = 0.5
    batch_size: int = 1
    samples: int = 250
    significance: float | None = None
    refit: int = 500
    seed: int = 0
    interaction: float = 0.0

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) + (self.max_loss_increase is not None) != 1:
            raise UserError(f"joint takes exactly one of {', '.join(BUDGETS)}, max_loss_increase")
        check_budget(given, self.batch_size)
        if self.max_loss_increase is not None and not self.max_loss_increase >= 0:
            raise UserError(f"max_loss_increase must be at least 0, got {self.max_loss_increase}")
        if not 0 < self.step < 1:
            raise UserError(f"step must lie in (0, 1), got {self.step}")
        if self.significance is not None and not self.significance >= 0:
            raise UserError(f"significance must be at least 0, got {self.significance}")
        if self.refit < 0:
            raise UserError(f"refit must be at least 0 samples, got {self.refit}")
        if not 0 <= self.interaction <= 1:
            raise UserError(f"interaction must lie in [0, 1], got {self.interaction}")
        if self.samples < 2:
            raise UserError(f"samples must be at least 2, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select components and cut. Raises ``UserError`` for a budget out of reach or no verification split."""
        bench = Workbench.of(model, decomposer, objective)
        if self.max_loss_increase is not None:
            search = _JointSearch(self, bench, costs_of(bench, "params"))
            search.to_tolerance(self.max_loss_increase)
            return search.finish()
        bench, costs, share = budget_of(bench, self.params_kept, self.macs_kept, self.milliseconds, self.batch_size)
        search = _JointSearch(self, bench, costs)
        search.to_budget(share)
        return search.finish()


@dataclass
class _Point:
    """Where a search stands: the components still there of every layer."""

    kept: dict[str, Tensor]
    predicted: float = 0.0


class _JointSearch:
    def __init__(self, chosen: Joint, bench: Workbench, costs: Costs) -> None:
        self.settings, self.bench, self.costs = chosen, bench, costs
        self.point = _Point({name: torch.arange(spectrum.max_rank) for name, spectrum in bench.spectra.items()})
        self.log: list[dict] = []
        self.left: dict[str, str] = {}  # layers without gates, and why: they stay dense

    def to_budget(self, target: float) -> None:
        self.costs.require(target)
        steps = math.ceil((1 - target) / self.settings.step - ROUNDING)
        with tqdm(desc="joint", total=max(0, round(100 * (1 - target))), unit="%", leave=False, disable=None) as bar:
            for done in range(1, steps + 1):
                reached = max(target, 1 - done * self.settings.step)
                self.point = self._advance(self.point, reached)
                bar.update(round(100 * (1 - reached)) - bar.n)
        if self.left and self._share(self.point) > target:
            raise UserError(f"the budget of {target:.4g} is out of reach of joint selection: {_reasons(self.left)}")

    def to_tolerance(self, increase: float) -> None:
        """Step down until the verified loss is too high, then again from the last good point with half the step."""
        objective, step = self.bench.objective, self.settings.step
        dense = paired_loss.losses(objective, self.bench.model, "verification")
        reached = 1.0
        while step >= SMALLEST_STEP:
            wanted = reached - step
            candidate = self._advance(self.point, wanted) if wanted > 0 else None
            change = None
            if candidate is not None:
                change = paired_loss.change(dense, paired_loss.losses(objective, self._cut(candidate), "verification"))
            passed = change is not None and change.mean + CAUTION * change.error <= increase
            said = {} if change is None else {"verified_change": change.mean, "standard_error": change.error}
            self.log.append({"share": wanted, **said, "passed": passed})
            if candidate is not None and passed:
                before, self.point, reached = reached, candidate, self._share(candidate)
                if not reached < before:  # every layer is down to one component: nothing is left to remove
                    return
            else:
                step /= 2

    def _advance(self, point: _Point, share: float) -> _Point:
        """Linearise at ``point`` and remove until ``share`` of the dense cost is left."""
        errors, layers = self.settings.significance, {}
        gates = self._linearised(point)
        self.left |= gates.left
        if not gates.rows:
            raise UserError(f"joint selection has no layer to choose from: {_reasons(self.left)}")
        for name, row in gates.rows.items():
            curve = self.costs.curves[name][: len(point.kept[name]) + 1]
            J_NR = row.drawn.double()
            alone = J_NR.square().mean(0) / 2
            if errors is not None:
                alone -= significant(row.given, errors)
            together = self.settings.interaction**0.5 * J_NR if self.settings.interaction else None
            layers[name] = Gated(alone, curve, self.costs.dense[name], together)
        elsewhere = self.costs.total - sum(self.costs.dense[name] for name in layers)
        budget = share * self.costs.total - elsewhere
        removal = remove(layers, budget)
        after = point.kept | {name: point.kept[name][kept] for name, kept in removal.kept.items()}
        found = _Point(after, point.predicted + removal.predicted)
        self.log.append({"share": self._share(found), "predicted": removal.predicted})
        return found

    def _linearised(self, point: _Point) -> Gates:
        """The gates at ``point``: the same whatever the budget, so that the search for another may have been there.

        With ``layers_at_once`` so many layers at a time are factored at full rank, which takes more than dense ones.
        """
        chosen, bench = self.settings, self.bench
        first_order = chosen.significance is not None
        left = {name: bench.spectra[name].kept(tuple(kept.tolist())) for name, kept in point.kept.items()}
        cut = {name for name, kept in point.kept.items() if len(kept) < bench.spectra[name].max_rank}

        def gates_of(block: Sequence[str], seen: Objective) -> Gates:
            plan = RankPlan.of({name: own for name, own in left.items() if name in cut or name in block})
            factored = replacing.apply(bench.model, plan, bench.spectra, shared=True)
            return gate_gradients(factored, block, seen, chosen.samples, seed=chosen.seed, first_order=first_order)

        def gates() -> Gates:
            blocks, seen = bench.objective.blocks(list(left)), bench.objective
            if len(blocks) > 1:  # rows of two layers are held against one another: they must be of the same samples
                seen = seen.held("calibration", chosen.samples)
            found = [gates_of(block, seen) for block in blocks]
            return Gates(*(dict(item for own in part for item in own.items()) for part in zip(*found, strict=True)))

        here = [*point.kept.values(), *bench.model.state_dict().values()]
        key = (chosen.samples, chosen.seed, bench.decomposer, first_order)
        return bench.objective.remembered(bench.model, "gates", lambda: (*key, content(here)), gates)

    def _keep(self, point: _Point) -> dict[str, tuple[int, ...]]:
        """What pays: a layer whose components cost no less than the dense layer stays dense."""
        return {name: tuple(kept.tolist()) for name, kept in point.kept.items() if self.costs.pays(name, len(kept))}

    def _refit(self, model: nn.Module) -> list[str]:
        """Fit the factors of ``model`` in place. Return notes on layers that are not fitted."""
        if not self.settings.refit:
            return []
        return refit(model, self.bench.model, self.bench.objective, self.settings.refit)

    def _cut(self, point: _Point) -> nn.Module:
        model = self.bench.cut(self._keep(point))
        self._refit(model)
        return model

    def _share(self, point: _Point) -> float:
        return self.costs.share({name: len(kept) for name, kept in point.kept.items()})

    def finish(self) -> Compressed:
        notes = (f"{name}: left dense: {reason}" for name, reason in self.left.items())
        bench = replace(self.bench, notes=(*self.bench.notes, *notes))
        compressed = bench.finish(self._keep(self.point), self.log)
        compressed.notes.extend(self._refit(compressed.model))
        return compressed


def _reasons(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name} stays dense: {reason}" for name, reason in left.items())


def significant(given_NR: Tensor, errors: float) -> Tensor:
    """The mean slope of every gate, shrunk towards zero by its standard error (positive-part James-Stein). Shape (R,).

    The greedy removal looks for the lowest of thousands of slopes, and would find those that chance made low: a slope
    of fewer than ``errors`` standard errors counts as zero, one of many counts in full.
    """
    given_NR = given_NR.double()
    slope, error = given_NR.mean(0), given_NR.std(0) / math.sqrt(len(given_NR))
    tiny = torch.finfo(slope.dtype).tiny
    return slope * (1 - (errors * error / slope.abs().clamp_min(tiny)).square()).clamp_min(0)
