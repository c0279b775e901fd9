"""What every algorithm is given, and what it returns."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.batches import Inputs
from spectrim.checkpoints import single_file
from spectrim.decomposers.spectrum import (
    NO_MOMENTS,
    Decomposer,
    Keep,
    Moments,
    Spectrum,
    content,
    rank_of,
    spectrum_of,
    value_at,
)
from spectrim.errors import UserError
from spectrim.factored.layers import dense_kinds
from spectrim.factored.plan import RankPlan
from spectrim.statistics.batchnorm import SAMPLES, BatchNorm, reestimate
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, latency, replacing
from spectrim.surgery.cost import Cost, model_cost
from spectrim.tools.profiling import Timed
from spectrim.tools.spill import Shelf


@runtime_checkable
class Algorithm(Protocol):
    """A selector. ``compress`` leaves the given model as it was and sees only what ``objective`` holds."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> "Compressed":
        """Select what to keep of each layer, and return the compressed copy."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model, how it was made, and what it costs.

    ``report``: one row a layer that could be factored: layer, shape, full_rank, break_even, rank (None: left dense),
    params_before, params_after, predicted_change (of the calibration loss, to first order), relative_error.
    ``log``: the steps of the algorithm; ``notes``: which layers could not be factored, and why; ``trained``: whether
    the weights left are no longer those of the given model. ``reporting``: what the report took, which no selection
    needs: seconds, cpu_seconds and samples_read of each split; where the selector had taken the gradients, next to
    nothing.
    """

    model: nn.Module
    plan: RankPlan
    report: pd.DataFrame
    dense: nn.Module = field(repr=False)
    example: Inputs = field(repr=False)
    log: list[dict] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    trained: bool = False
    reporting: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def cost(self) -> Cost:
        """Parameters and MACs of the compressed model."""
        return model_cost(self.model, self.example)

    @cached_property
    def dense_cost(self) -> Cost:
        """Parameters and MACs of the given model."""
        return model_cost(self.dense, self.example)

    @property
    def params_kept(self) -> float:
        """Parameters of the whole compressed model over those of the whole dense one."""
        return self.cost.params / self.dense_cost.params

    @property
    def macs_kept(self) -> float:
        """MACs of the whole compressed model over those of the whole dense one."""
        return self.cost.macs / self.dense_cost.macs

    @property
    def predicted_change(self) -> float:
        """First-order change of the calibration loss, summed over the factored layers."""
        return float(self.report.loc[self.report["rank"].notna(), "predicted_change"].sum())

    def settle(self, batch_norm: BatchNorm, objective: Objective) -> "Compressed":
        """Itself, its BatchNorm statistics re-estimated on calibration samples where ``batch_norm`` is ``follow``.

        Raises ``UserError`` after a training, whose statistics are its own.
        """
        if batch_norm == "follow" and self.trained:
            raise UserError("batch_norm=follow compares with the given model, which a training leaves: use keep")
        if batch_norm == "follow" and self.plan:
            reestimate(self.model, self.dense, objective, SAMPLES)
        return self

    def save(self, path: str | Path) -> None:
        """Write the compressed model as safetensors; ``spectrim.load(path, into=dense_model)`` reads it back."""
        single_file.save(path, self.model, self.plan)


class Workbench:
    """One model laid open: its layers, their spectra (each decomposed once) and the objective to judge them by."""

    def __init__(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> None:
        self.model, self.objective, self.example = model, objective, objective.example()
        self.decomposer = decomposer
        layers, left = find_layers.factorable(model, self.example, decomposer.embeddings)
        self.notes = [f"{name}: left dense: {reason}" for name, reason in left.items()]
        self.spectra: dict[str, Spectrum] = {}
        self.timed_at: int | None = None  # batch size, where a budget is one of time: then no slower model is returned
        self._curves: dict[str, dict[str, Tensor]] = {}
        for name, spectrum in self._decomposed(layers).items():
            if spectrum.break_even:
                self.spectra[name] = spectrum
            else:
                self.notes.append(f"{name}: left dense: no rank is below break-even")
        if not self.spectra:
            raise UserError("this model has nothing to factor: no Linear or Conv2d layer gets smaller at any rank")

    def _decomposed(self, layers: Mapping[str, nn.Module]) -> dict[str, Spectrum]:
        """The spectrum of every layer. Plain ones are remembered layer by layer; whitened ones, as the objective says,
        all together, for it takes a pass through the model to know that the moments are the same."""
        decomposer = self.decomposer
        if not decomposer.samples:
            return self._spectra(layers)
        state = self.model.state_dict()
        return self.objective.memory.get(
            self.model,
            "whitened",
            lambda: (decomposer, tuple(layers), content(state.values())),
            lambda: self._spectra(layers),
        )

    def _spectra(self, layers: Mapping[str, nn.Module]) -> dict[str, Spectrum]:
        """Those of a block of layers at a time where the objective says so; they are then laid aside on the disk."""
        objective, decomposer = self.objective, self.decomposer
        shelf = None if objective.layers_at_once is None else Shelf()
        found: dict[str, Spectrum] = {}
        with tqdm(desc="decompose", total=len(layers), unit="layer", leave=False, disable=None) as bar:
            for block in objective.blocks(list(layers)):
                forms = {name: decomposer.forms(layers[name]) for name in block}
                moments: Mapping[str, Moments] = {}
                if decomposer.samples:
                    moments = input_moments(self.model, forms, objective, decomposer.samples)
                for name in block:
                    found[name] = _spectrum(name, layers[name], decomposer, moments.get(name, NO_MOMENTS))
                    if shelf:
                        found[name].lay_aside(shelf)
                    bar.update()
        return found

    def first_order(self, split: str = "calibration", model: nn.Module | None = None) -> dict[str, Tensor]:
        """``<G, delta_k>`` of every layer at every rank. With ``model`` (partly factored), of its dense layers."""
        if model is None:
            if split not in self._curves:  # the gradients may come in blocks, which nobody remembers
                self._curves[split] = self.first_order(split, self.model)
            return dict(self._curves[split])
        dense = [name for name in self.spectra if isinstance(model.get_submodule(name), dense_kinds())]
        gradients = self.objective.each_gradient(model, dense, split)
        return {name: self.spectra[name].first_order(gradient) for name, gradient in gradients}

    def finish(self, keep: Mapping[str, Keep], log: list[dict] | None = None) -> Compressed:
        """The compressed model with what to keep of each layer, a rank or the indices of components.

        Layers absent, or with more components than break-even, stay dense; all do where a budget of time was set and
        the whole is measured to be no faster so.
        """
        kept = self._faster(self._below_break_even(keep))
        plan = self._plan(kept)
        report, spent = reported(lambda: self._report(kept), self.objective)  # before the copy: gradients take room too
        return Compressed(
            model=replacing.apply(self.model, plan, self.spectra),
            plan=plan,
            report=report,
            dense=self.model,
            example=self.example,
            log=log or [],
            notes=self.notes,
            reporting=spent,
        )

    def cut(self, keep: Mapping[str, Keep]) -> nn.Module:
        """The model of ``finish``, without the report: to be measured and thrown away."""
        return replacing.apply(self.model, self._plan(self._below_break_even(keep)), self.spectra)

    def _below_break_even(self, keep: Mapping[str, Keep]) -> dict[str, Keep]:
        return {name: which for name, which in keep.items() if rank_of(which) <= self.spectra[name].break_even}

    def _faster(self, kept: dict[str, Keep]) -> dict[str, Keep]:
        """``kept`` itself; nothing, where the clock says that it gains nothing."""
        if self.timed_at is None or not kept:
            return kept
        small = replacing.apply(self.model, self._plan(kept), self.spectra)
        dense, ours = latency.in_turns([self.model, small], self.example, self.timed_at)
        self.notes.append(f"as a whole, measured in turns: {ours:.4g} ms against {dense:.4g} ms dense")
        if ours < dense:
            return kept
        self.notes.append("left dense: factored, the model is no faster as a whole, whatever its layers are")
        return {}

    def _plan(self, kept: Mapping[str, Keep]) -> RankPlan:
        return RankPlan.of({name: self.spectra[name].kept(which) for name, which in kept.items()})

    def _report(self, kept: Mapping[str, Keep]) -> pd.DataFrame:
        predicted = self.first_order()
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
                    "predicted_change": value_at(predicted[name], which),
                    "relative_error": math.sqrt(max(0.0, value_at(spectrum.relative_error().square(), which))),
                }
            )
        return pd.DataFrame(rows).astype({"rank": "Int64"})


def reported(make: Callable[[], pd.DataFrame], objective: Objective) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The report, and what it took (``Compressed.reporting``)."""
    before = Counter(objective.read)
    with Timed() as spent:
        report = make()
    read = dict(objective.read - before)
    return report, {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "samples_read": read}


def _spectrum(name: str, layer: nn.Module, decomposer: Decomposer, moments: Moments) -> Spectrum:
    try:
        return spectrum_of(layer, decomposer, moments)
    except UserError as error:
        raise UserError(f"layer {name}: {error}") from None
