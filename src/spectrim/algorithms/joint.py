"""Joint selection: choose the singular components to remove over all layers together, to second order."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.bisection import bisect
from spectrim.algorithms.shared.budget import BUDGETS, Costs, budget_of, check_budget, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.every_size import EverySize
from spectrim.algorithms.shared.expansion import gates_at, together
from spectrim.algorithms.shared.refined import refined
from spectrim.algorithms.shared.removal import Gated, Removal, keep_dearest, remove
from spectrim.algorithms.shared.slopes import believed, changes
from spectrim.algorithms.shared.tied_curve import leaving_unmeasured, measured_changes, samples_measured
from spectrim.algorithms.shared.tolerance import verifier
from spectrim.algorithms.shared.work import Outlook, Work
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.best_view import PIVOTED
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.refit import factors
from spectrim.refit.refinement import Refinement
from spectrim.refit.weighting import RefitBy, output_weights
from spectrim.statistics.objective import Objective
from spectrim.surgery.find_layers import in_one_line, left_dense
from spectrim.tools.live import Bar
from spectrim.tools.settings import settings

TRIES = 7  # models that a search by tolerance measures: the size is then known to a hundredth of the dense one
SMALLEST_STEP = 1 / 64  # a share of the dense cost: a greedy search by tolerance ends at smaller steps
GREEDY_TRIES = 10  # models that a greedy search is expected to measure
ROUNDING = 1e-9  # of a step: a smaller rest of the way to the budget takes no step of its own


@settings
class Joint:
    """Remove the components with the lowest predicted change of the loss per saved cost, in whichever layer they are.

    The prediction is a second-order expansion in a gate on each component (``removal``), from ``samples`` calibration
    samples. Without ``interaction`` the prediction is a sum over components, so the best choice within a budget is a
    knapsack over the ranks of all layers. Exactly one of the first four is set.

    ``params_kept``, ``macs_kept``: the part of the whole model that is kept, in (0, 1), met from below.
    ``milliseconds``: a budget above 0 for one forward pass of ``batch_size`` samples. All layers are timed on this
        machine first. A layer, or the whole model, stays dense where factoring does not make it faster.
    ``max_loss_increase``: the rise of the loss on the verification split that is allowed, at least 0. As few
        parameters as possible are kept. A model passes if the mean rise and two standard errors of it stay within the
        limit. The error falls with the root of the number of verification samples, so more samples allow more
        compression. Seven sizes (``TRIES``) are tried by bisection. Each costs a refit and one pass over this split. No
        gradient is taken on it.
    ``ranks``: ``"knapsack"`` solves for the ranks of all layers at once (``knapsack``). ``"greedy"`` removes one
        component or block of components after another (``removal``), and a search by tolerance then goes down in steps.
    ``step``: the share of the dense cost that is removed between two expansions, in (0, 1]. The loss is expanded anew
        after each step, at the partly compressed model. 1 expands it once, at the dense model.
    ``refit``: number of calibration samples on which the kept factors are fitted to the outputs of the dense layers
        (``factors.refit``). 0 leaves them as they are cut. For class scores, no label is used.
    ``refit_by``: ``"loss"``: an error of an output counts as much as the loss feels it, to second order
        (``weighting.output_weights``). ``"outputs"``: the errors of all outputs of a layer count alike.
    ``refine``: gradient steps after the refit, without labels (``refinement.Refinement``); None takes none.
    ``significance``: add the first order, with each slope shrunk by this many standard errors (``significant``); 0 does
        not shrink. ``"auto"`` finds their number on halves of the samples (``believed``). None leaves the first order
        out: a trained network is near a minimum, where slopes are noise (Table 9). A decoder is not (Table 3).
    ``interaction``: the weight, in [0, 1], of the Fisher entries off the diagonal, by which components act on each
        other. Some hundred images give too noisy estimates (Table 9), so it is 0 by default. Above 0 the effect
        of a removal depends on what else is gone, so it needs ``ranks="greedy"``.
    ``seed``: seed of the random directions from which the Fisher information is estimated.
    """

    params_kept: float | None = None
    macs_kept: float | None = None
    milliseconds: float | None = None
    max_loss_increase: float | None = None
    ranks: Literal["knapsack", "greedy"] = "knapsack"
    step: float = 1.0
    batch_size: int = 1
    samples: int = 250
    significance: float | Literal["auto"] | None = None
    refit: int = 500
    seed: int = 0
    interaction: float = 0.0
    refine: Refinement | None = None
    refit_by: RefitBy = "loss"

    decomposer: ClassVar[Decomposer] = PIVOTED  # where the user names none

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in (*BUDGETS, "max_loss_increase")}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) != 1:
            raise UserError(f"joint takes exactly one of {', '.join(sizes)}; got {given or 'none'}")
        check_budget({name: value for name, value in given.items() if name in BUDGETS}, self.batch_size)
        if self.max_loss_increase is not None and not self.max_loss_increase >= 0:
            raise UserError(f"max_loss_increase must be at least 0, got {self.max_loss_increase}")
        if not 0 < self.step <= 1:
            raise UserError(f"step must lie in (0, 1], got {self.step}")
        if not (self.significance is None or self.significance == "auto" or self.significance >= 0):
            raise UserError(f"significance must be at least 0, auto or null, got {self.significance}")
        if self.refit < 0:
            raise UserError(f"refit must be at least 0 samples, got {self.refit}")
        if not 0 <= self.interaction <= 1:
            raise UserError(f"interaction must lie in [0, 1], got {self.interaction}")
        if self.interaction and self.ranks == "knapsack":
            raise UserError(
                f"interaction={self.interaction} needs ranks=greedy: in a knapsack components do not interact"
            )
        if self.samples < 2:
            raise UserError(f"samples must be at least 2, got {self.samples}")

    def work(self, outlook: Outlook) -> Work:
        """Return the work: the expansions and the refit, and several of each where a tolerance is searched for."""
        directions, searched = 1 if self.significance is None else 2, self.max_loss_increase is not None
        kept, greedy = self.params_kept or self.macs_kept or 0.0, self.ranks == "greedy"
        models = (GREEDY_TRIES if greedy else TRIES) if searched else 1
        expansions = models if searched and greedy else math.ceil((1 - kept) / self.step - ROUNDING)
        return Work(
            gates=expansions * directions * outlook.first(self.samples),
            refit=models * outlook.first(self.refit),
            weighed=outlook.first(self.refit) if self.refit_by == "loss" else 0,
            refine=self.refine.samples if self.refine else 0,
            evaluations=((models + 1) * outlook.of("verification") if searched else 0) + samples_measured(outlook),
            params_kept=self.params_kept,
            macs_kept=self.macs_kept,
            at_most=searched,
        )

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select components and cut. Raises ``UserError`` for a budget out of reach or missing verification batches."""
        if self.max_loss_increase is not None:
            objective.given("verification")  # refused before the decomposition
        if self.refine is not None:
            self.refine.require(model, objective)
        bench = Workbench.of(model, decomposer, leaving_unmeasured(model, objective))
        if self.max_loss_increase is not None:
            search = _JointSearch(self, bench, costs_of(bench, "params"))
            search.to_tolerance(self.max_loss_increase)
            return search.finish()
        bench, costs, requested = budget_of(bench, self.params_kept, self.macs_kept, self.milliseconds, self.batch_size)
        search = _JointSearch(self, bench, costs)
        search.to_budget(requested)
        return search.finish()


@dataclass
class _Point:
    """A point of the search: the indices of the components kept of every layer, and the predicted change.

    ``layers``: the expansion of the loss at this point, once it is made.
    """

    kept: dict[str, Tensor]
    predicted: float = 0.0
    layers: dict[str, Gated] | None = None


class _JointSearch:
    """The way from the dense model down to a budget or a tolerance. ``log`` has an entry for each step."""

    def __init__(self, chosen: Joint, bench: Workbench, costs: Costs) -> None:
        self.settings, self.bench, self.costs = chosen, bench, costs
        self.dense = _Point({name: torch.arange(spectrum.max_rank) for name, spectrum in bench.spectra.items()})
        self.point = self.dense
        self.log: list[dict] = []
        self.without_gates: dict[str, str] = {}  # layers that stay dense, and why they have no gates

    def to_budget(self, requested: float) -> None:
        """Go down from the dense model to the ``requested`` share of its cost. Raises ``UserError`` out of reach."""
        self.costs.require(requested)
        total = max(0, round(100 * (1 - requested)))
        with Bar(desc="joint", total=total, unit="%", leave=False) as bar:
            for share in self._shares(requested):
                self.point = self._advance(self.point, share)
                bar.update(round(100 * (1 - share)) - bar.n)
        if self.without_gates and self._achieved(self.point) > requested:
            reasons = in_one_line(self.without_gates)
            asked = self.costs.named(requested)
            raise UserError(f"{asked} is out of reach of joint selection, which leaves {reasons}")

    def _shares(self, requested: float) -> list[float]:
        """Return the shares at which the model is cut on the way to ``requested``, in equal steps."""
        step = self.settings.step
        count = math.ceil((1 - requested) / step - ROUNDING)
        return [max(requested, 1 - done * step) for done in range(1, count + 1)]

    def to_tolerance(self, increase: float) -> None:
        """Find the smallest share of the dense cost whose verified loss rises by no more than ``increase``."""
        passes = verifier(self.bench, increase, self._cut, self.log)
        if self.settings.ranks == "greedy":
            self._step_down(passes)
        else:
            self._bisect(passes)

    def _bisect(self, passes: Callable[[float, "_Point | None"], bool]) -> None:
        """Find the smallest share that passes. All tries share the expansion at the dense model."""
        start, most = self.point, 1 - self.costs.least()
        known: dict[float, _Point] = {}  # by share; steps on the way to one share lead to others too

        def at(removed: float) -> _Point | None:
            point, requested = start, 1 - min(removed, most)
            for share in self._shares(requested):
                if share not in known:
                    known[share] = self._advance(point, share)
                point = known[share]
            return point if passes(requested, point) else None

        # A bisection does not try its ends. Ended here, its last try is rank 1 everywhere if no try fails.
        end = most / (1 - 0.5**TRIES)
        self.point = bisect(at, 0.0, end, TRIES, "joint") or start

    def _step_down(self, passes: Callable[[float, "_Point | None"], bool]) -> None:
        """Go down until a point does not pass. Then halve the step and go on from the last good point."""
        step, achieved = self.settings.step, 1.0
        while step >= SMALLEST_STEP:
            requested = achieved - step
            candidate = self._advance(self.point, requested) if requested > 0 else None
            passed = passes(requested, candidate)
            if candidate is not None and passed:
                before, self.point, achieved = achieved, candidate, self._achieved(candidate)
                if not achieved < before:  # every layer is down to one component: nothing is left to remove
                    return
            else:
                step /= 2

    def _advance(self, point: _Point, requested: float) -> _Point:
        """Expand the loss at ``point`` and remove components until the ``requested`` share of the cost is left."""
        layers = point.layers = point.layers or self._expanded(point, requested)
        removal = self._removal(layers, requested)
        after = point.kept | {name: point.kept[name][own] for name, own in removal.kept.items()}
        found = _Point(after, point.predicted + removal.predicted)
        self.log.append({"share": self._achieved(found), "predicted": removal.predicted})
        return found

    def _removal(self, layers: dict[str, Gated], requested: float) -> Removal:
        budget = self.costs.of_layers(requested, layers)
        return keep_dearest(layers, budget) if self.settings.ranks == "knapsack" else remove(layers, budget)

    def _expanded(self, point: _Point, requested: float) -> dict[str, Gated]:
        """Expand the loss at ``point``. Return each layer with the predicted change of the components it has left.

        ``requested``: the first share that is gone down to, at which slopes are believed as far as they hold.
        """
        errors, samples, seed = self.settings.significance, self.settings.samples, self.settings.seed
        measured = {name: own[point.kept[name]] for name, own in measured_changes(self.bench).items()}
        gates = gates_at(self.bench, point.kept, samples, seed, errors is not None, list(measured))
        self.without_gates |= gates.left
        if not gates.rows and not measured:
            raise UserError(f"joint selection has no layer to choose from: {in_one_line(self.without_gates)}")

        def gated(alone: Mapping[str, Tensor]) -> dict[str, Gated]:
            layers = {}
            for name, alone_R in {**measured, **alone}.items():
                curve = self.costs.curves[name][: len(point.kept[name]) + 1]
                acting = together(gates, name, len(alone_R), self.settings.interaction)
                layers[name] = Gated(alone_R, curve, self.costs.dense[name], acting)
            return layers

        if errors == "auto":
            errors = believed(gates.rows, lambda alone: self._removal(gated(alone), requested).kept)
            self.log.append({"significance": errors})
        return gated({name: changes(row, errors) for name, row in gates.rows.items()})

    def _keep(self, point: _Point) -> dict[str, tuple[int, ...]]:
        """Return the components to keep of each layer that gets cheaper. The other layers stay dense."""
        return {name: tuple(own.tolist()) for name, own in point.kept.items() if self.costs.pays(name, len(own))}

    def _refitted(self, model: nn.Module) -> list[str]:
        """Fit the factors of ``model`` in place. Return notes on the layers that are not fitted."""
        if not self.settings.refit:
            return []
        dense, objective, samples = self.bench.model, self.bench.objective, self.settings.refit
        weights = output_weights(self.settings.refit_by, dense, self.bench.all_spectra, objective, samples)
        return factors.refit(model, dense, objective, samples, weights=weights)

    def _cut(self, point: _Point) -> nn.Module:
        model = self.bench.trial(self._keep(point))
        self._refitted(model)
        return model

    def _achieved(self, point: _Point) -> float:
        return self.costs.achieved({name: len(own) for name, own in point.kept.items()})

    def finish(self) -> Compressed:
        """Return the model at the point that was reached."""
        notes = left_dense(self.without_gates, self.bench.model)
        compressed = self.bench.finish(self._keep(self.point), self.log, notes)
        notes = [*compressed.notes, *self._refitted(compressed.model)]
        compressed = replace(compressed, notes=notes, every_size=self._every_size())
        return refined(compressed, self.bench.model, self.bench.objective, self.settings.refine)

    def _every_size(self) -> Callable[[Path], None] | None:
        """Return what writes the file of every size; None where components have no price apart from a budget."""
        if self.settings.ranks != "knapsack" or self.settings.step < 1 or self.dense.layers is None:
            return None
        return EverySize(self.bench, self.dense.layers, self.settings.refit, self.settings.refit_by).save
