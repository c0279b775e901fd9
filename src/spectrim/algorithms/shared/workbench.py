"""Decompose the layers of a model for an algorithm, and make the model of what it keeps."""

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import pandas as pd
from torch import Tensor, nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.decomposed import decomposed
from spectrim.algorithms.shared.layer_report import reporter
from spectrim.batches import Inputs
from spectrim.decomposers.spectrum import Decomposer, Spectrum, value_at
from spectrim.errors import MissingInput, UserError
from spectrim.factored.dense import dense_kinds
from spectrim.factored.plan import Keep, RankPlan, rank_of
from spectrim.statistics.loss_apart import require_apart
from spectrim.statistics.objective import Objective
from spectrim.statistics.switched_off import SWITCHED_OFF, switched_off
from spectrim.surgery import find_layers, latency, replacing, tied
from spectrim.surgery.captured import refuse_captured
from spectrim.surgery.cost import layer_parameters
from spectrim.surgery.given_model import copied, eager, restorer, unchanged, versions
from spectrim.surgery.layer_choice import LayerChoice
from spectrim.surgery.reopening import factored_layers, kept_in, reopened
from spectrim.surgery.stand_ins import UNSTEADY, misled_and_steady
from spectrim.surgery.trial_run import failing_layers
from spectrim.surgery.unpacking import pack, unpacked


@dataclass(frozen=True, eq=False)
class Workbench:
    """Open a model for an algorithm: each layer that can be factored is decomposed once. Nothing in it changes.

    ``given``: the model that the user gave.
    ``before``: the same model, or a copy in which each matrix is a layer (``unpacking``).
    ``model``: ``before``, or a copy in which the layers that an earlier compression factored are dense again. An
        algorithm works on this one. It must not change it.
    ``example``: the inputs of the first calibration batch; None where none were given.
    ``spectra``: the spectrum of each layer whose rank an algorithm may choose, by name, in the model's order.
    ``fixed``: the spectrum of each layer whose rank the user has set, and that rank.
    ``left``: why each layer stays dense that can have no rank.
    ``notes``: one line for each of these, and what a budget measured.
    ``timed_at``: the batch size of a budget in milliseconds; None where there is no such budget. ``finish`` then
        returns the dense model if the compressed one is no faster.
    ``restore``: gives ``model`` the state that it had when it was opened. A pass may count its calls, for example.
    """

    given: nn.Module
    before: nn.Module
    model: nn.Module
    decomposer: Decomposer
    objective: Objective
    example: Inputs | None
    spectra: Mapping[str, Spectrum]
    fixed: Mapping[str, tuple[Spectrum, int]]
    left: Mapping[str, str]
    notes: tuple[str, ...]
    restore: Callable[[], None]
    timed_at: int | None = None
    # Gradients that come in blocks of layers are not kept by the objective. The curves made of them are kept here.
    _curves: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, decomposer: Decomposer, objective: Objective) -> "Workbench":
        """Find the layers of ``model`` that can be factored and decompose them.

        Raises ``UserError`` where no layer gets smaller at any rank.
        """
        example, before = objective.example(), unpacked(model) if eager(model) is model else model
        opened = reopened(before)
        restore = restorer(opened)
        layers, left = find_layers.factorable(opened, example, decomposer.embeddings, objective.choice)
        require_apart(model, layers, objective)
        spectra: dict[str, Spectrum] = {}
        for name, spectrum in decomposed(opened, decomposer, objective, layers).items():
            if _is_smaller(before, name, spectrum, 1):
                spectra[name] = spectrum
            else:
                left[name] = "no rank is below break-even"

        def at_rank_1(kept: Mapping[str, Keep]) -> nn.Module:
            return replacing.apply(opened, replacing.plan_of(spectra, kept), spectra, shared=True)

        left |= _that_runs(at_rank_1, dict.fromkeys(spectra, 1), example)[1]
        running, steady = [name for name in spectra if name not in left], True
        if example is None:
            refuse_captured(model)
        elif running:
            found, steady = misled_and_steady(opened, model, running, example)
            left |= found
        spectra = {name: spectrum for name, spectrum in spectra.items() if name not in left}
        if not spectra:
            reasons = find_layers.in_one_line(left) or f"it has no {' or '.join(k.__name__ for k in dense_kinds())}"
            raise UserError(f"this model has nothing to factor: {reasons}")
        notes = (*find_layers.left_dense(left, opened), *tied.in_lines(opened, spectra))
        if not steady:
            notes = (f"{UNSTEADY}: a loss is that of one draw, and a layer may be called by chance", *notes)
        overrides = _overrides(objective.choice, spectra, {**left, **tied.notes(opened, spectra)})
        fixed = {name: (spectra.pop(name), rank) for name, rank in overrides.items()}
        given = model, before, opened, decomposer, objective, example
        views = MappingProxyType(spectra), MappingProxyType(fixed), MappingProxyType(left)
        return cls(*given, *views, notes, restore)

    def decomposed_by(self, decomposer: Decomposer) -> "Workbench":
        """Return a workbench on which another decomposer has decomposed the layers whose rank may be chosen."""
        layers = {name: self.model.get_submodule(name) for name in self.spectra}
        found = decomposed(self.model, decomposer, self.objective, layers)
        spectra = {name: own for name, own in found.items() if _is_smaller(self.before, name, own, 1)}
        return replace(self, decomposer=decomposer, spectra=MappingProxyType(spectra))

    @property
    def all_spectra(self) -> dict[str, Spectrum]:
        """Return the spectra of all layers, with those whose rank the user has set, in the model's order."""
        found = {**self.spectra, **{name: spectrum for name, (spectrum, _) in self.fixed.items()}}
        return {name: found[name] for name, _ in self.model.named_modules() if name in found}

    def params_of(self, name: str) -> int:
        """Return the number of parameters of layer ``name`` in the given model, without its bias."""
        return layer_parameters(self.before, name)

    def rank_at(self, name: str, part: float) -> int:
        """Return the largest rank of layer ``name`` within ``part`` of its parameters, from 1 to break-even."""
        spectrum = self.spectra[name]
        return min(max(spectrum.rank_within(part * self.params_of(name)), 1), spectrum.break_even)

    def to_train(self) -> nn.Module:
        """Return a copy of ``model`` for a training: layers whose rank the user has set are factored already.

        Raises ``UserError`` for an embedding that shares its weight: a training of its factors would untie it.
        """
        if shared := next(iter(tied.notes(self.model, self.spectra)), None):
            raise UserError(
                f"{shared} shares its weight with an embedding, which cannot be trained as factors; exclude it"
            )
        return self._built({name: rank for name, (_, rank) in self.fixed.items()}, opened=self.spectra)

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
        spectra = self.all_spectra
        dense = [name for name in spectra if isinstance(model.get_submodule(name), dense_kinds())]
        gradients = self.objective.each_gradient(model, dense, split)
        return {name: spectra[name].first_order(gradient) for name, gradient in gradients}

    def finish(self, keep: Mapping[str, Keep], log: list[dict] | None = None, notes: Iterable[str] = ()) -> Compressed:
        """Return the compressed model.

        ``keep``: what to keep of each layer, a rank or the indices of components. A layer that is absent, or that would
        not get smaller, stays as it is. So does a layer at which the factored model fails on ``example``.
        ``log``: the steps of the algorithm.
        ``notes``: what the algorithm notes, after the notes of the workbench.
        """
        kept = self._smaller(keep)
        model, failing = _that_runs(lambda own: pack(self._built(own)), kept, self.example)
        kept = {name: own for name, own in kept.items() if name not in failing}
        notes = [*self.notes, *notes, *find_layers.left_dense(failing, self.model)]
        if self.timed_at is not None and kept:
            faster, timed = self._is_faster(model, self.timed_at)
            notes += timed
            if not faster:
                kept, model = {}, pack(self._built({}))
        before = {name: layer for name, layer in factored_layers(self.given).items() if name not in kept}
        now = versions(self.given)
        return Compressed(
            model=model,
            plan=RankPlan.of({**{name: kept_in(layer) for name, layer in before.items()}, **self._plan(kept)}),
            reporter=reporter(lambda: self._report(kept, now), self.objective),
            dense=self.given,
            example=self.example,
            log=log or [],
            notes=notes,
        )

    def trial(self, keep: Mapping[str, Keep]) -> nn.Module:
        """Return a model that computes what that of ``finish`` does, to be measured and thrown away.

        It shares the parameters that are not factored with ``model``.
        """
        self.restore()
        return replacing.apply(self.model, self._plan(self._smaller(keep)), self.all_spectra, shared=True)

    def example_for(self, purpose: str) -> Inputs:
        """Return ``example``. Raises ``MissingInput`` where there is none; ``purpose`` says what needs it."""
        if self.example is None:
            raise MissingInput(f"{purpose} runs the model; pass calibration=, batches of its inputs")
        return self.example

    def _smaller(self, keep: Mapping[str, Keep]) -> dict[str, Keep]:
        """Return what to keep of the layers that get smaller, with the ranks that the user has set."""
        keep = {**keep, **{name: rank for name, (_, rank) in self.fixed.items()}}
        spectra = self.all_spectra
        return {name: own for name, own in keep.items() if _is_smaller(self.before, name, spectra[name], rank_of(own))}

    def _built(self, kept: Mapping[str, Keep], opened: Container[str] = ()) -> nn.Module:
        """Return the compressed model. A layer that is not in ``kept`` is as it was given, or dense if ``opened``."""
        self.restore()
        model = replacing.apply(self.model, self._plan(kept), self.all_spectra)
        for name, layer in factored_layers(self.given).items():
            if name not in kept and name not in opened:
                replacing.replace(model, name, copied(layer))
        return model

    def _is_faster(self, model: nn.Module, batch_size: int) -> tuple[bool, list[str]]:
        """Return whether ``model`` is faster than the given one, and notes on what was measured."""
        example = self.example_for("a budget in milliseconds")
        with unchanged(self.given), unchanged(model):
            dense, ours = latency.in_turns([self.given, model], example, batch_size)
        notes = [f"as a whole, measured in turns: {ours:.4g} ms against {dense:.4g} ms dense"]
        slower = "left dense: factored, the model is no faster as a whole, whatever its layers are"
        return (True, notes) if ours < dense else (False, [*notes, slower])

    def _plan(self, kept: Mapping[str, Keep]) -> RankPlan:
        return replacing.plan_of(self.all_spectra, kept)

    def _predicted(self, kept: Mapping[str, Keep], then: tuple[int, ...]) -> tuple[dict[str, Tensor], str]:
        """Return the first order for the report, and why there is none; empty where there is one.

        There is none where the model switches gradients off around a layer of ``kept``.
        """
        if "calibration" not in self._curves and versions(self.given) != then:
            return {}, "the given model has changed since it was compressed, so that nothing can be predicted now"
        try:
            with unchanged(self.model):
                self.restore()
                found = self.first_order()
                off = switched_off(self.model, kept.keys() - found.keys(), self.example)
                return ({}, f"{min(off)}: {SWITCHED_OFF}") if off else (found, "")
        except UserError as error:
            return {}, str(error)

    def _report(self, kept: Mapping[str, Keep], then: tuple[int, ...]) -> tuple[pd.DataFrame, str]:
        """Return the report, and why it predicts nothing; empty where it does (``layer_report``)."""
        predicted, unpredicted = self._predicted(kept, then)
        outside = math.nan if unpredicted else 0.0
        rows = []
        for name, spectrum in self.all_spectra.items():
            weight, keep, params = self.model.get_submodule(name).weight, kept.get(name), self.params_of(name)
            # A layer that stays dense has no rank, and keeps everything.
            rank, which = (None, spectrum.max_rank) if keep is None else (rank_of(keep), keep)
            rows.append(
                {
                    "layer": name,
                    "shape": tuple(weight.shape),  # type: ignore[arg-type]
                    "full_rank": spectrum.max_rank,
                    "break_even": spectrum.break_even,
                    "rank": rank,
                    "params_before": params,
                    "params_after": params if rank is None else spectrum.cost(rank),
                    "predicted_change": value_at(predicted[name], which) if name in predicted else outside,
                    "relative_error": spectrum.relative_error_at(which),
                }
            )
        return pd.DataFrame(rows).astype({"rank": "Int64"}), unpredicted


def _that_runs(
    make: Callable[[Mapping[str, Keep]], nn.Module], keep: Mapping[str, Keep], example: Inputs | None
) -> tuple[nn.Module, dict[str, str]]:
    """Return the model ``make(kept)`` that runs on ``example``, and why each other layer of ``keep`` is not in it."""
    failing: dict[str, str] = {}
    while True:
        kept = {name: own for name, own in keep.items() if name not in failing}
        model = make(kept)
        first = {other: name for name, others in tied.tied_layers(model).items() for other in others}
        found = failing_layers(model, {**kept, **first}, example) if kept and example is not None else {}
        if not found:
            return model, failing
        for name, reason in found.items():
            failing[first.get(name, name)] = f"the model fails with it factored: {reason}"


def _is_smaller(model: nn.Module, name: str, spectrum: Spectrum, rank: int) -> bool:
    """Return whether layer ``name`` has fewer parameters at ``rank`` than in ``model``."""
    return rank <= spectrum.break_even and spectrum.cost(rank) < layer_parameters(model, name)


def _overrides(choice: LayerChoice, spectra: Mapping[str, Spectrum], left: Mapping[str, str]) -> dict[str, int]:
    """Return the ranks that the user has set. Raises ``UserError`` for a layer or rank at which that cannot be."""
    for name, rank in choice.overrides:
        if name not in spectra:
            raise UserError(f"overrides: {name!r} cannot be factored: {left.get(name, 'it is no layer with a matrix')}")
        if rank > spectra[name].break_even:
            most = spectra[name].break_even
            raise UserError(f"overrides[{name!r}]={rank} is above {most}, the largest rank at which it gets smaller")
    return dict(choice.overrides)
