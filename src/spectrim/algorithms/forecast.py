"""What a selection will take and give, before anything heavy: sizes, seconds and memory, with what is estimated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from spectrim.algorithms.joint import Joint
from spectrim.algorithms.shared.budget import Costs
from spectrim.algorithms.shared.outline import Outline, block_of, decomposing_bytes
from spectrim.algorithms.shared.rehearsal import Rehearsal, factored_model
from spectrim.algorithms.shared.tied_curve import leaving_unmeasured
from spectrim.algorithms.shared.work import Foreseen, Outlook, Work
from spectrim.batches import sample_count
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics import packed
from spectrim.statistics.loss_apart import require_apart
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, tied
from spectrim.surgery.cost import Cost, layer_macs, model_cost, parameters
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.reopening import reopened
from spectrim.surgery.unpacking import unpacked
from spectrim.tools.profiling import duration

MIB = 2**20


@dataclass(frozen=True)
class Forecast:
    """What a selection will take and give.

    ``layers``: one row a layer that can be factored: layer, shape, full_rank, break_even, rank (missing: dense),
        params_before, params_after. These ranks keep an equal share of each layer; an algorithm that measures takes
        others.
    ``dense``, ``compressed``: parameters and MACs before, and of the model with these ranks. MACs are NaN without
        calibration batches; ``compressed`` is None where nothing says how small the model will be.
    ``seconds``: expected time of each part of the selection.
    ``memory_mib``: expected peak of each part, above what the process holds now.
    ``notes``: which layers stay dense and why, and what the estimate leaves out.
    """

    algorithm: str
    layers: pd.DataFrame
    dense: Cost
    compressed: Cost | None
    seconds: Mapping[str, float]
    memory_mib: Mapping[str, float]
    notes: list[str]

    def __str__(self) -> str:
        small = self.compressed
        unknown = "not known before the selection"
        size, macs = (
            (unknown, unknown)
            if small is None
            else (f"{own:,.0f}, {100 * own / old:.1f} %" for own, old in zip(small, self.dense, strict=True))
        )
        counted = f"{self.dense.macs:,.0f} -> {macs}"
        spent, peak = sum(self.seconds.values()), max(self.memory_mib.values())
        parts = ", ".join(f"{name} {duration(own, 1)}" for name, own in self.seconds.items() if own >= 0.05)
        lines = [
            f"{self.algorithm}: nothing is compressed yet",
            f"parameters  {self.dense.params:,} -> {size}",
            f"MACs        {'counted where calibration= is given' if math.isnan(self.dense.macs) else counted}",
            f"time        about {duration(spent, 1)}" + (f": {parts}" if parts else ""),
            f"memory      about {peak:,.0f} MiB above the present at the peak",
            "",
            self.layers.to_string(index=False, max_rows=24),
            *self.notes,
        ]
        return "\n".join(lines)


def forecast(model: nn.Module, algorithm: Any, decomposer: Decomposer, objective: Objective) -> Forecast:
    """Return what ``algorithm`` will take and give on ``model``.

    It runs one batch and decomposes the smaller layers, which takes some seconds; the rest is reckoned from these. A
    time is right within a factor of three or so on a machine that does nothing else. Raises ``UserError`` as the
    selection would, for all that one batch shows.
    """
    opened, example = reopened(unpacked(model)), objective.example()
    if isinstance(getattr(algorithm, "selector", algorithm), Joint):
        objective = leaving_unmeasured(opened, objective)
    with unchanged(opened):
        found, left = find_layers.factorable(opened, example, decomposer.embeddings, objective.choice)
        require_apart(model, found, objective)
        layers = [Outline.of(name, module, decomposer) for name, module in found.items()]
        layers = [layer for layer in layers if layer.break_even > 0]
        if not layers:
            raise UserError(f"this model has nothing to factor: {find_layers.in_one_line(left)}")
        samples = {name: _samples(objective, name) for name in objective.splits}
        outlook = Outlook(samples, len(layers), len(tied.tied_layers(opened).keys() & found.keys()))
        work = algorithm.work(outlook) if isinstance(algorithm, Foreseen) else None
        ranks = _ranks(opened, layers, work or Work(), objective, example, find_layers.dense_shares(left, opened))
        notes = find_layers.left_dense(left, opened) + tied.in_lines(opened, found)
        seconds, memory = _taken(opened, layers, ranks, work, decomposer, objective, notes)
        compressed = None if ranks is None else _cost(factored_model(opened, layers, ranks), example)
        return Forecast(
            type(algorithm).__name__, _table(layers, ranks), _cost(opened, example), compressed, seconds, memory, notes
        )


def _samples(objective: Objective, split: str) -> int:
    """Return the number of samples of a split: by its length where it has one, otherwise by reading it."""
    batches, given = iter(objective.batches(split)), objective.given(split)
    first = next(batches, None)
    if first is None:
        return 0
    size = sample_count(first[1], first[0])
    try:
        return size * len(given)  # type: ignore[arg-type]
    except TypeError:
        return size + sum(sample_count(targets, inputs) for inputs, targets in batches)


def _cost(model: nn.Module, example: Any) -> Cost:
    return Cost(parameters(model), math.nan) if example is None else model_cost(model, example)  # type: ignore[arg-type]


def _ranks(
    model: nn.Module, layers: Sequence[Outline], work: Work, objective: Objective, example: Any, outside: str
) -> dict[str, int] | None:
    """Return the ranks that keep an equal share of each layer and meet the budget, below break-even; None without one.

    A layer that is absent stays dense. Raises ``UserError`` for a budget out of reach. ``outside``: as in ``Costs``.
    """
    fixed = dict(objective.choice.overrides)
    if work.ranks is not None:
        return {**work.ranks, **fixed}
    chosen = [layer for layer in layers if layer.name not in fixed]
    if work.rank is not None:
        wanted = {layer.name: work.rank for layer in chosen}
    elif work.ratio is not None:
        wanted = {layer.name: max(1, layer.rank_within(work.ratio * layer.params)) for layer in chosen}
    elif work.params_kept is not None:
        costs = Costs("params", {one.name: float(one.params) for one in layers}, {}, parameters(model), outside=outside)
        wanted = _within(costs, work.params_kept, layers, fixed)
    elif work.macs_kept is not None and example is not None:
        dense, total = layer_macs(model, [layer.name for layer in layers], example)
        # pivots save no multiplication in a convolution
        counted = [layer.plain() if isinstance(layer.module, nn.Conv2d) else layer for layer in layers]
        wanted = _within(Costs("macs", dense, {}, total, outside=outside), work.macs_kept, counted, fixed)
    else:
        return fixed or None
    ranks = wanted | fixed
    return {layer.name: ranks[layer.name] for layer in layers if ranks[layer.name] <= layer.break_even}


def _within(costs: Costs, requested: float, layers: Sequence[Outline], fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks of the layers that are not ``fixed`` at the largest common share that is within the budget.

    ``costs``: those of all layers, without curves.
    """
    each = {layer.name: costs.dense[layer.name] / layer.params for layer in layers}  # what a parameter costs
    of_fixed = [layer for layer in layers if layer.name in fixed]
    saved = sum(each[one.name] * (one.params - one.cost(fixed[one.name])) for one in of_fixed)
    chosen = {layer.name: layer for layer in layers if layer.name not in fixed}
    curves = {
        name: each[name] * torch.tensor([layer.cost(rank) for rank in range(layer.full_rank + 1)], dtype=torch.float64)
        for name, layer in chosen.items()
    }
    costs = replace(costs, dense={name: costs.dense[name] for name in chosen}, curves=curves, fixed=saved)

    def ranks_at(share: float) -> dict[str, int]:
        return {name: max(1, layer.rank_within(share * layer.params)) for name, layer in chosen.items()}

    return costs.meet(requested, ranks_at, low=0.0, high=1.0)


def _table(layers: Sequence[Outline], ranks: Mapping[str, int] | None) -> pd.DataFrame:
    rows = []
    for layer in layers:
        rank = (ranks or {}).get(layer.name)
        rows.append(
            {
                "layer": layer.name,
                "shape": tuple(layer.module.weight.shape),  # type: ignore[arg-type]
                "full_rank": layer.full_rank,
                "break_even": layer.break_even,
                "rank": rank,
                "params_before": layer.params,
                "params_after": layer.params if rank is None else layer.cost(rank),
            }
        )
    return pd.DataFrame(rows).astype({"rank": "Int64"})


def _taken(
    model: nn.Module,
    layers: Sequence[Outline],
    ranks: Mapping[str, int] | None,
    work: Work | None,
    decomposer: Decomposer,
    objective: Objective,
    notes: list[str],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds and the peak memory, in MiB, of each part of the selection; add notes on what is left out."""
    does = work or Work()
    if does.gradients or does.gates or does.refit or decomposer.samples:
        objective.given("calibration")
    batch = next(iter(objective.batches("calibration")), None) if "calibration" in objective.splits else None
    plain = [layer.plain() for layer in layers]  # passes and fits are those of plain factors
    rehearsal = Rehearsal(model, plain, decomposer, objective, batch)
    taken = decomposer.samples if batch is None else min(decomposer.samples, _samples(objective, "calibration"))
    moment_seconds, moments = rehearsal.moments() if decomposer.samples else (0.0, {})
    seconds = {"decompose": taken * moment_seconds + rehearsal.decompositions(moments, does.largest_entries)}
    held_moments = packed.nbytes(moments.values()) if moments else None
    memory = decomposing_bytes(model, layers, objective.layers_at_once, held_moments)
    parts = _Parts(rehearsal, does, ranks, memory.pop("held"), notes)
    for name, asked, part in (
        ("gradients", does.gradients, parts.gradients),
        ("gates", does.gates, parts.gates),
        ("verify", does.evaluations, parts.verify),
        ("refit", does.refit, parts.refit),
        ("refine", does.refine, parts.refine),
    ):
        if asked:
            seconds[name], memory[name] = part()
    if work is None:
        notes.append("the time is that of the decompositions: this algorithm does not say what else it will do")
    if does.at_most:
        notes.append("the time is an upper bound: the selection may end earlier")
    return seconds, {name: own / MIB for name, own in memory.items()}


@dataclass(frozen=True)
class _Parts:
    """The parts of a selection after the decompositions: each gives its seconds, and the bytes at its peak.

    ``held``: bytes of the decompositions that are in memory all the time.
    """

    rehearsal: Rehearsal
    does: Work
    ranks: Mapping[str, int] | None
    held: float
    notes: list[str]

    @property
    def model_bytes(self) -> int:
        return self.item * parameters(self.rehearsal.model)

    @property
    def item(self) -> int:
        """Bytes of one weight."""
        return next(self.rehearsal.model.parameters()).element_size()

    @property
    def block(self) -> float:
        """The part of the layers that is in memory at once."""
        return block_of(self.rehearsal.layers, self.rehearsal.objective.layers_at_once)

    def gradients(self) -> tuple[float, float]:
        each, saved = self.rehearsal.gradient_pass()
        weights = sum(layer.params for layer in self.rehearsal.layers)
        entry = self.item + max(self.item, 4)  # bytes, of the gradient of a batch and of the sum
        peak = self.held + entry * self.block * weights + self.rehearsal.count * saved
        return self.does.gradients * each, peak

    def gates(self) -> tuple[float, float]:
        layers, count = self.rehearsal.layers, self.rehearsal.count
        each, saved = self.rehearsal.gate_pass()
        full = self.item * self.block * sum(layer.full_rank * layer.component for layer in layers)
        rows = 4 * 2 * self.does.gates * sum(layer.full_rank for layer in layers)
        peak = self.held + full + rows + count * saved
        if (fewer := (count - 1) * saved) > peak / 2:
            self.notes.append(f"with batches of one sample the gates would take about {fewer / MIB:,.0f} MiB less")
        return self.does.gates * each, peak

    def verify(self) -> tuple[float, float]:
        return self.does.evaluations * self.rehearsal.forward_seconds(), self.held + self.model_bytes

    def refit(self) -> tuple[float, float]:
        rehearsal, does = self.rehearsal, self.does
        halves = {layer.name: max(1, layer.break_even // 2) for layer in rehearsal.layers}
        ranks, flows = self.ranks or halves, rehearsal.flows()
        seconds = 2 * does.refit * rehearsal.forward_seconds() + rehearsal.refit_moments(does.refit, flows)
        positions = {name: does.refit * own for name, (_, own) in flows.items()}
        seconds += rehearsal.fits(ranks, "loss" if does.weighed else "outputs", positions)
        peak = self.held + self.model_bytes + 2 * does.refit * max(own for own, _ in flows.values())
        peak += rehearsal.refit_bytes(ranks)
        if does.weighed:
            seconds += does.weighed * rehearsal.gradient_pass()[0]
            peak += rehearsal.weighing_bytes() if rehearsal.objective.layers_at_once is None else 0
        return seconds, peak

    def refine(self) -> tuple[float, float]:
        # Of a step: a pass of the dense model, and a pass forth and back, which takes three.
        seconds = self.does.refine * 4 * self.rehearsal.forward_seconds()
        return seconds, self.held + 5 * self.model_bytes  # weights, the best ones, gradients and two moments of them
