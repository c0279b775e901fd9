"""What an algorithm works on: the layers of a model, each decomposed, and the model made of what it keeps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import pandas as pd
from torch import Tensor, nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.decomposed import decomposed
from spectrim.algorithms.shared.layer_report import reporter
from spectrim.batches import Inputs
from spectrim.decomposers.spectrum import Decomposer, Keep, Spectrum, rank_of, value_at
from spectrim.errors import MissingInput, UserError
from spectrim.factored.dense import dense_kinds
from spectrim.factored.plan import RankPlan
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, latency, replacing
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.trial_run import failing_layers


@dataclass(frozen=True, eq=False)
class Workbench:
    """A model opened for an algorithm: each layer that can be factored is decomposed once. Nothing in it changes.

    ``example``: the inputs of the first calibration batch; None where none were given.
    ``spectra``: the spectrum of each layer that can be factored, by name, in the model's order.
    ``notes``: one line for each layer that stays dense, with the reason, and what a budget measured.
    ``timed_at``: the batch size of a budget in milliseconds; None where there is no such budget. ``finish`` then
        returns the dense model if the compressed one is no faster.
    """

    model: nn.Module
    decomposer: Decomposer
    objective: Objective
    example: Inputs | None
    spectra: Mapping[str, Spectrum]
    notes: tuple[str, ...]
    timed_at: int | None = None
    # Gradients that come in blocks of layers are not kept by the objective. The curves made of them are kept here.
    _curves: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, decomposer: Decomposer, objective: Objective) -> "Workbench":
        """Find the layers of ``model`` that can be factored and decompose them.

        Raises ``UserError`` where no layer gets smaller at any rank.
        """
        example = objective.example()
        layers, left = find_layers.factorable(model, example, decomposer.embeddings)
        spectra: dict[str, Spectrum] = {}
        for name, spectrum in decomposed(model, decomposer, objective, layers).items():
            if spectrum.break_even:
                spectra[name] = spectrum
            else:
                left[name] = "no rank is below break-even"
        left |= _failing(model, spectra, dict.fromkeys(spectra, 1), example)
        spectra = {name: spectrum for name, spectrum in spectra.items() if name not in left}
        if not spectra:
            reasons = find_layers.in_one_line(left) or f"it has no {' or '.join(k.__name__ for k in dense_kinds())}"
            raise UserError(f"this model has nothing to factor: {reasons}")
        notes = [f"{name}: left dense: {reason}" for name, reason in left.items()]
        return cls(model, decomposer, objective, example, MappingProxyType(spectra), tuple(notes))

    def first_order(self, split: str = "calibration", model: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the first-order change ``<G, delta_k>`` of the loss for each layer at every rank, shape (R + 1,).

        A layer that the loss does not depend on is left out.

        ``split``: the split from which the gradient G comes.
        ``model``: a partly factored copy whose dense layers are meant; None: the model of the workbench.
        """
        if model is None:
            if split not in self._curves:
                self._curves[split] = self.first_order(split, self.model)
            return dict(self._curves[split])
        dense = [name for name in self.spectra if isinstance(model.get_submodule(name), dense_kinds())]
        gradients = self.objective.each_gradient(model, dense, split)
        return {name: self.spectra[name].first_order(gradient) for name, gradient in gradients}

    def finish(self, keep: Mapping[str, Keep], log: list[dict] | None = None) -> Compressed:
        """Return the compressed model.

        ``keep``: what to keep of each layer, a rank or the indices of components. A layer that is absent, or that keeps
        more components than break-even, stays dense.
        """
        kept, notes = self._faster(self._below_break_even(keep))
        for name, reason in _failing(self.model, self.spectra, kept, self.example).items():
            del kept[name]
            notes.append(f"{name}: left dense: {reason}")
        plan = self._plan(kept)
        versions = _versions(self.model)
        return Compressed(
            model=replacing.apply(self.model, plan, self.spectra),
            plan=plan,
            reporter=reporter(lambda: self._report(kept, versions), self.objective),
            dense=self.model,
            example=self.example,
            log=log or [],
            notes=[*self.notes, *notes],
        )

    def cut(self, keep: Mapping[str, Keep]) -> nn.Module:
        """Return the model of ``finish`` without a report, to be measured and thrown away."""
        return replacing.apply(self.model, self._plan(self._below_break_even(keep)), self.spectra)

    def example_for(self, purpose: str) -> Inputs:
        """Return ``example``. Raises ``MissingInput`` where there is none; ``purpose`` says what needs it."""
        if self.example is None:
            raise MissingInput(f"{purpose} runs the model; pass calibration=, batches of its inputs")
        return self.example

    def _below_break_even(self, keep: Mapping[str, Keep]) -> dict[str, Keep]:
        return {name: which for name, which in keep.items() if rank_of(which) <= self.spectra[name].break_even}

    def _faster(self, kept: dict[str, Keep]) -> tuple[dict[str, Keep], list[str]]:
        """Return ``kept`` and notes, or nothing to keep where a budget of time is set and the clock shows no gain."""
        if self.timed_at is None or not kept:
            return kept, []
        small = replacing.apply(self.model, self._plan(kept), self.spectra)
        dense, ours = latency.in_turns([self.model, small], self.example_for("a budget in milliseconds"), self.timed_at)
        notes = [f"as a whole, measured in turns: {ours:.4g} ms against {dense:.4g} ms dense"]
        if ours < dense:
            return kept, notes
        return {}, [*notes, "left dense: factored, the model is no faster as a whole, whatever its layers are"]

    def _plan(self, kept: Mapping[str, Keep]) -> RankPlan:
        return RankPlan.of({name: self.spectra[name].kept(which) for name, which in kept.items()})

    def _predicted(self, versions: tuple[int, ...]) -> tuple[dict[str, Tensor], str]:
        """Return the first order for the report, and why there is none; empty where there is one."""
        if "calibration" not in self._curves and _versions(self.model) != versions:
            return {}, "the given model has changed since it was compressed, so that nothing can be predicted now"
        try:
            with unchanged(self.model):
                return self.first_order(), ""
        except UserError as error:
            return {}, str(error)

    def _report(self, kept: Mapping[str, Keep], versions: tuple[int, ...]) -> tuple[pd.DataFrame, str]:
        """Return the report, and why it predicts nothing; empty where it does (``layer_report``)."""
        predicted, unpredicted = self._predicted(versions)
        outside = math.nan if unpredicted else 0.0
        rows = []
        for name, spectrum in self.spectra.items():
            weight, keep = self.model.get_submodule(name).weight, kept.get(name)
            # A layer that stays dense has no rank, and keeps everything.
            rank, which = (None, spectrum.max_rank) if keep is None else (rank_of(keep), keep)
            rows.append(
                {
                    "layer": name,
                    "shape": tuple(weight.shape),  # type: ignore[arg-type]
                    "full_rank": spectrum.max_rank,
                    "break_even": spectrum.break_even,
                    "rank": rank,
                    "params_before": weight.numel(),  # type: ignore[operator]
                    "params_after": weight.numel() if rank is None else spectrum.cost(rank),  # type: ignore[operator]
                    "predicted_change": value_at(predicted[name], which) if name in predicted else outside,
                    "relative_error": math.sqrt(max(0.0, value_at(spectrum.relative_error().square(), which))),
                }
            )
        return pd.DataFrame(rows).astype({"rank": "Int64"}), unpredicted


def _failing(
    model: nn.Module, spectra: Mapping[str, Spectrum], kept: Mapping[str, Keep], example: Inputs | None
) -> dict[str, str]:
    """Return the layers of ``kept`` with which the model fails once they are factored, and the reason of each."""
    found: dict[str, str] = {}
    while example is not None and (rest := {name: keep for name, keep in kept.items() if name not in found}):
        plan = RankPlan.of({name: spectra[name].kept(keep) for name, keep in rest.items()})
        failing = failing_layers(replacing.apply(model, plan, spectra, shared=True), rest, example)
        if not failing:
            break
        found |= {name: f"the model fails with it factored: {reason}" for name, reason in failing.items()}
    return found


def _versions(model: nn.Module) -> tuple[int, ...]:
    """Return a count of the changes of each parameter and buffer. It tells most changes, at no cost."""
    values = [*model.parameters(), *model.buffers()]
    return tuple(-1 if value.is_inference() else value._version for value in values)
