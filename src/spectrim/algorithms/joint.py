"""Joint selection: choose the singular components to remove over all layers together, to second order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.budget import BUDGETS, Costs, budget_of, check_budget, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.removal import Gated, remove
from spectrim.algorithms.shared.work import Outlook, Work
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.best_view import PIVOTED
from spectrim.decomposers.spectrum import Decomposer, content
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.refit import factors
from spectrim.statistics import paired_loss
from spectrim.statistics.fisher import Gates, gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.find_layers import in_one_line, left_dense
from spectrim.tools.settings import settings

SMALLEST_STEP = 1 / 64  # a share of the dense cost: a search by tolerance ends at smaller steps
TRIES = 10  # models that a search by tolerance is expected to measure
CAUTION = 2.0  # standard errors above the mean: a search tries some ten models, and one of them may pass by chance
ROUNDING = 1e-9  # of a step: a smaller rest of the way to the budget takes no step of its own


@settings
class Joint:
    """Remove the components with the lowest predicted change of the loss per saved cost, in whichever layer they are.

    The prediction is a second-order expansion in a gate on each component (``removal``). It is computed anew after each
    step, at the partly compressed model, from ``samples`` calibration samples. Exactly one of the first four is set.

    ``params_kept``, ``macs_kept``: the part of the whole model that is kept, in (0, 1), met from below.
    ``milliseconds``: a budget above 0 for one forward pass of ``batch_size`` samples. All layers are timed on this
        machine first. A layer, or the whole model, stays dense where factoring does not make it faster.
    ``max_loss_increase``: the rise of the loss on the verification split that is allowed, at least 0. As few
        parameters as possible are kept. A model passes if the mean rise and two standard errors of it stay within the
        limit, so more samples allow more compression. No gradient is taken on this split.
    ``step``: the share of the dense cost that is removed between two expansions, in (0, 1).
    ``refit``: number of calibration samples on which the kept factors are fitted to the outputs of the dense layers
        (``factors.refit``). 0 leaves them as they are cut. For class scores, no label is used.
    ``significance``: add the first order, with each slope shrunk by this many standard errors (``significant``); 0 does
        not shrink. None leaves the first order out, because a trained network is near a minimum and some hundred
        images give too noisy slopes (Table 9). A decoder is not at a minimum on other texts (Table 3).
    ``interaction``: the weight, in [0, 1], of the Fisher entries off the diagonal, by which components act on each
        other. Some hundred images give too noisy estimates (Table 9), so it is 0 by default.
    ``seed``: seed of the random directions from which the Fisher information is estimated.
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

    decomposer: ClassVar[Decomposer] = PIVOTED  # where the user names none

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

    def work(self, outlook: Outlook) -> Work:
        """Return the work: the expansions and the refit, and some ten of each where a tolerance is searched for."""
        directions, searched = 1 if self.significance is None else 2, self.max_loss_increase is not None
        kept = self.params_kept or self.macs_kept or 0.0
        expansions = TRIES if searched else math.ceil((1 - kept) / self.step - ROUNDING)
        models = TRIES if searched else 1
        return Work(
            gates=expansions * directions * outlook.first(self.samples),
            refit=models * outlook.first(self.refit),
            evaluations=(models + 1) * outlook.of("verification") if searched else 0,
            params_kept=self.params_kept,
            macs_kept=self.macs_kept,
            at_most=searched,
        )

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select components and cut. Raises ``UserError`` for a budget out of reach or missing verification batches."""
        if self.max_loss_increase is not None:
            objective.given("verification")  # refused before the decomposition
        bench = Workbench.of(model, decomposer, objective)
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
    """A point of the search: the indices of the components kept of every layer, and the predicted change."""

    kept: dict[str, Tensor]
    predicted: float = 0.0


class _JointSearch:
    """The way from the dense model down to a budget or a tolerance. ``log`` has an entry for each step."""

    def __init__(self, chosen: Joint, bench: Workbench, costs: Costs) -> None:
        self.settings, self.bench, self.costs = chosen, bench, costs
        self.point = _Point({name: torch.arange(spectrum.max_rank) for name, spectrum in bench.spectra.items()})
        self.log: list[dict] = []
        self.without_gates: dict[str, str] = {}  # layers that stay dense, and why they have no gates

    def to_budget(self, requested: float) -> None:
        """Go down to the ``requested`` share of the dense cost, in equal steps."""
        self.costs.require(requested)
        steps = math.ceil((1 - requested) / self.settings.step - ROUNDING)
        total = max(0, round(100 * (1 - requested)))
        with tqdm(desc="joint", total=total, unit="%", leave=False, disable=None) as bar:
            for done in range(1, steps + 1):
                share = max(requested, 1 - done * self.settings.step)
                self.point = self._advance(self.point, share)
                bar.update(round(100 * (1 - share)) - bar.n)
        if self.without_gates and self._achieved(self.point) > requested:
            reasons = in_one_line(self.without_gates)
            raise UserError(f"the budget of {requested:.4g} is out of reach of joint selection, which leaves {reasons}")

    def to_tolerance(self, increase: float) -> None:
        """Go down until the verified loss rises too far. Then halve the step and go on from the last good point."""
        objective, step = self.bench.objective, self.settings.step
        dense = paired_loss.losses(objective, self.bench.model, "verification")
        achieved = 1.0
        while step >= SMALLEST_STEP:
            requested = achieved - step
            candidate = self._advance(self.point, requested) if requested > 0 else None
            change = None
            if candidate is not None:
                change = paired_loss.change(dense, paired_loss.losses(objective, self._cut(candidate), "verification"))
            passed = change is not None and change.mean + CAUTION * change.error <= increase
            said = {} if change is None else {"verified_change": change.mean, "standard_error": change.error}
            self.log.append({"share": requested, **said, "passed": passed})
            if candidate is not None and passed:
                before, self.point, achieved = achieved, candidate, self._achieved(candidate)
                if not achieved < before:  # every layer is down to one component: nothing is left to remove
                    return
            else:
                step /= 2

    def _advance(self, point: _Point, requested: float) -> _Point:
        """Expand the loss at ``point`` and remove components until the ``requested`` share of the cost is left."""
        errors, layers = self.settings.significance, {}
        gates = self._linearised(point)
        self.without_gates |= gates.left
        if not gates.rows:
            raise UserError(f"joint selection has no layer to choose from: {in_one_line(self.without_gates)}")
        for name, row in gates.rows.items():
            curve = self.costs.curves[name][: len(point.kept[name]) + 1]
            J_NR = row.fisher.double()
            alone = J_NR.square().mean(0) / 2
            if errors is not None:
                alone -= significant(row.given, errors)
            together = self.settings.interaction**0.5 * J_NR if self.settings.interaction else None
            layers[name] = Gated(alone, curve, self.costs.dense[name], together)
        elsewhere = self.costs.total - self.costs.fixed - sum(self.costs.dense[name] for name in layers)
        removal = remove(layers, requested * self.costs.total - elsewhere)
        after = point.kept | {name: point.kept[name][own] for name, own in removal.kept.items()}
        found = _Point(after, point.predicted + removal.predicted)
        self.log.append({"share": self._achieved(found), "predicted": removal.predicted})
        return found

    def _linearised(self, point: _Point) -> Gates:
        """Return the gate gradients at ``point``. They do not depend on the budget, so they are remembered.

        With ``layers_at_once`` only one block of layers at a time is factored at full rank, because factors of full
        rank take more memory than a dense layer.
        """
        chosen, bench = self.settings, self.bench
        first_order = chosen.significance is not None
        kept = {name: bench.spectra[name].kept(tuple(own.tolist())) for name, own in point.kept.items()}
        plain = {name: spectrum.plain() for name, spectrum in bench.spectra.items()}
        smaller = {name for name, own in point.kept.items() if len(own) < bench.spectra[name].max_rank}

        def gates_of(block: Sequence[str], seen: Objective) -> Gates:
            plan = RankPlan.of({name: own for name, own in kept.items() if name in smaller or name in block})
            factored = replacing.apply(bench.model, plan, plain, shared=True)
            return gate_gradients(factored, block, seen, chosen.samples, seed=chosen.seed, first_order=first_order)

        def gates() -> Gates:
            blocks, seen = bench.objective.blocks(list(kept)), bench.objective
            if len(blocks) > 1:  # rows of two layers are compared, so they must come from the same samples
                seen = seen.held("calibration", chosen.samples)
            found = [gates_of(block, seen) for block in blocks]
            return Gates(*(dict(item for own in part for item in own.items()) for part in zip(*found, strict=True)))

        here = [*point.kept.values(), *bench.model.state_dict().values()]
        key = (tuple(point.kept), chosen.samples, chosen.seed, bench.decomposer, first_order)
        return bench.objective.remembered(bench.model, "gates", lambda: (*key, content(here)), gates)

    def _keep(self, point: _Point) -> dict[str, tuple[int, ...]]:
        """Return the components to keep of each layer that gets cheaper. The other layers stay dense."""
        return {name: tuple(own.tolist()) for name, own in point.kept.items() if self.costs.pays(name, len(own))}

    def _refitted(self, model: nn.Module) -> list[str]:
        """Fit the factors of ``model`` in place. Return notes on the layers that are not fitted."""
        if not self.settings.refit:
            return []
        return factors.refit(model, self.bench.model, self.bench.objective, self.settings.refit)

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
        return replace(compressed, notes=[*compressed.notes, *self._refitted(compressed.model)])


def significant(given_NR: Tensor, errors: float) -> Tensor:
    """Return the mean slope of every gate, shrunk towards zero by its standard error. Shape (R,).

    The estimator is the positive-part James-Stein one. Greedy removal takes the lowest of thousands of slopes, and
    would find those that are low by chance. A slope below ``errors`` standard errors becomes zero, and a slope of many
    standard errors hardly changes.

    ``given_NR``: the slope of each sample, shape (N, R).
    """
    given_NR = given_NR.double()
    slope, error = given_NR.mean(0), given_NR.std(0) / math.sqrt(len(given_NR))
    tiny = torch.finfo(slope.dtype).tiny
    return slope * (1 - (errors * error / slope.abs().clamp_min(tiny)).square()).clamp_min(0)
