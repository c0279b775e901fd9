"""What an algorithm works on: the layers of a model, each decomposed, and the model made of what it keeps."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.batches import Inputs
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
from spectrim.factored.dense import dense_kinds
from spectrim.factored.plan import RankPlan
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, latency, replacing
from spectrim.tools.profiling import Timed
from spectrim.tools.spill import SpillFolder


@dataclass(frozen=True, eq=False)
class Workbench:
    """A model opened for an algorithm: each layer that can be factored is decomposed once. Nothing in it changes.

    ``example``: the inputs of the first calibration batch.
    ``spectra``: the spectrum of each layer that can be factored, by name, in the model's order.
    ``notes``: one line for each layer that stays dense, with the reason, and what a budget measured.
    ``timed_at``: the batch size of a budget in milliseconds; None where there is no such budget. ``finish`` then
        returns the dense model if the compressed one is no faster.
    """

    model: nn.Module
    decomposer: Decomposer
    objective: Objective
    example: Inputs
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
        for name, spectrum in _decomposed(model, decomposer, objective, layers).items():
            if spectrum.break_even:
                spectra[name] = spectrum
            else:
                left[name] = "no rank is below break-even"
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
        plan = self._plan(kept)
        report, spent = reported(lambda: self._report(kept), self.objective)  # before the copy: gradients take room too
        return Compressed(
            model=replacing.apply(self.model, plan, self.spectra),
            plan=plan,
            report=report,
            dense=self.model,
            example=self.example,
            log=log or [],
            notes=[*self.notes, *notes],
            reporting=spent,
        )

    def cut(self, keep: Mapping[str, Keep]) -> nn.Module:
        """Return the model of ``finish`` without a report, to be measured and thrown away."""
        return replacing.apply(self.model, self._plan(self._below_break_even(keep)), self.spectra)

    def _below_break_even(self, keep: Mapping[str, Keep]) -> dict[str, Keep]:
        return {name: which for name, which in keep.items() if rank_of(which) <= self.spectra[name].break_even}

    def _faster(self, kept: dict[str, Keep]) -> tuple[dict[str, Keep], list[str]]:
        """Return ``kept`` and notes, or nothing to keep where a budget of time is set and the clock shows no gain."""
        if self.timed_at is None or not kept:
            return kept, []
        small = replacing.apply(self.model, self._plan(kept), self.spectra)
        dense, ours = latency.in_turns([self.model, small], self.example, self.timed_at)
        notes = [f"as a whole, measured in turns: {ours:.4g} ms against {dense:.4g} ms dense"]
        if ours < dense:
            return kept, notes
        return {}, [*notes, "left dense: factored, the model is no faster as a whole, whatever its layers are"]

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
                    "predicted_change": value_at(predicted[name], which) if name in predicted else 0.0,
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


def _decomposed(
    model: nn.Module, decomposer: Decomposer, objective: Objective, layers: Mapping[str, nn.Module]
) -> dict[str, Spectrum]:
    """Return the spectrum of every layer.

    Plain spectra are cached for each layer. Whitened ones are cached all together in the memory of ``objective``,
    because their moments take a pass through the model.
    """
    if not decomposer.samples:
        return _spectra(model, decomposer, objective, layers)
    return objective.remembered(
        model,
        "whitened",
        lambda: (decomposer, tuple(layers), content(model.state_dict().values())),
        lambda: _spectra(model, decomposer, objective, layers),
    )


def _spectra(
    model: nn.Module, decomposer: Decomposer, objective: Objective, layers: Mapping[str, nn.Module]
) -> dict[str, Spectrum]:
    """Decompose the layers in the blocks of ``objective``. With ``layers_at_once`` the factors are kept on disk."""
    folder = None if objective.layers_at_once is None else SpillFolder()
    found: dict[str, Spectrum] = {}
    with tqdm(desc="decompose", total=len(layers), unit="layer", leave=False, disable=None) as bar:
        for block in objective.blocks(list(layers)):
            views = {name: decomposer.views(layers[name]) for name in block}
            moments: Mapping[str, Moments] = {}
            if decomposer.samples:
                moments = input_moments(model, views, objective, decomposer.samples)
            for name in block:
                found[name] = _spectrum(name, layers[name], decomposer, moments.get(name, NO_MOMENTS))
                if folder:
                    found[name].spill(folder)
                bar.update()
    return found


def _spectrum(name: str, layer: nn.Module, decomposer: Decomposer, moments: Moments) -> Spectrum:
    try:
        return spectrum_of(layer, decomposer, moments)
    except UserError as error:
        raise UserError(f"layer {name}: {error}") from None
