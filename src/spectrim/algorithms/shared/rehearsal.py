"""What one batch, and the smaller layers, tell of the seconds and bytes that a whole selection takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter as clock
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.decomposed import moments_for
from spectrim.algorithms.shared.outline import Outline
from spectrim.batches import device_of, evaluating, first_argument, forward, sample_count, to_device
from spectrim.decomposers.spectrum import NO_MOMENTS, Decomposer, Moments
from spectrim.factored.dense import DenseLayer
from spectrim.factored.plan import Kept, RankPlan
from spectrim.refit.factors import rehearse_fit
from spectrim.refit.moments import POSITIONS
from spectrim.refit.ridge import few
from spectrim.refit.weighting import RefitBy
from spectrim.statistics.fisher import gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.statistics.packed import PackedMoments
from spectrim.statistics.shifted_moments import is_wide, shifts
from spectrim.surgery import replacing
from spectrim.tools.hooks import hooked
from spectrim.tools.sparse import plain_parts
from spectrim.tools.trainable import alone_trainable

GROWTH = 0.9  # larger matrices take less time for each operation
SECONDS = 1.0  # for the decompositions, and for the fits, that are rehearsed; the first one may take longer


def factored_model(model: nn.Module, layers: Sequence[Outline], ranks: Mapping[str, int]) -> nn.Module:
    """Return ``model`` with random factors in ``layers``. It shares its other weights."""
    kept = {layer.name: (layer, ranks[layer.name]) for layer in layers if layer.name in ranks}
    plan = RankPlan.of({name: Kept(rank, layer.form_at(rank)) for name, (layer, rank) in kept.items()})
    blanks: Any = {layer.name: layer for layer in layers}  # in place of spectra, of which only ``factor`` is called
    return replacing.apply(model, plan, blanks, shared=True)


@dataclass(frozen=True)
class Rehearsal:
    """The first batch of calibration samples, run through a model. Seconds and bytes are those of one sample."""

    model: nn.Module
    layers: Sequence[Outline]
    decomposer: Decomposer
    objective: Objective
    batch: Any

    @property
    def count(self) -> int:
        return sample_count(self.batch[1], self.batch[0])

    def forward_seconds(self) -> float:
        """Return the seconds of a forward pass."""
        inputs = to_device(self.batch[0], device_of(self.model))
        with evaluating(self.model), torch.no_grad():
            return _seconds(lambda: forward(self.model, inputs)) / self.count

    def gradient_pass(self) -> tuple[float, int]:
        """Return the seconds of a gradient by all weights, and the bytes that its forward pass saves."""
        names, one = [layer.name for layer in self.layers], self._of_one_batch()
        saved = _Saved(self.model)
        weights: Any = [layer.module.weight for layer in self.layers]
        inputs = to_device(self.batch[0], device_of(self.model))
        with evaluating(self.model), alone_trainable(self.model, weights), torch.enable_grad(), saved.counting():
            forward(self.model, inputs)
        return _seconds(lambda: one.gradients(self.model, names)) / self.count, saved.bytes // self.count

    def gate_pass(self) -> tuple[float, int]:
        """Return the seconds of a gradient by all gates at full rank, and the bytes that its forward pass saves."""
        full = {layer.name: layer.full_rank for layer in self.layers}
        factored, one = factored_model(self.model, self.layers, full), self._of_one_batch()
        saved = _Saved(factored)

        def gates() -> None:
            gate_gradients(factored, list(full), one, self.count, first_order=False)

        with saved.counting():
            gates()
        return _seconds(gates) / self.count, saved.bytes // self.count

    def moments(self) -> tuple[float, Mapping[str, PackedMoments]]:
        """Return the seconds of the passes that take second moments, and those of the first batch."""
        layers = {layer.name: layer.module for layer in self.layers}
        began = clock()
        found = moments_for(self.decomposer, self.model, layers, self._of_one_batch())
        return (clock() - began) / self.count if found else 0.0, found

    def decompositions(self, moments: Mapping[str, Moments], twice: bool) -> float:
        """Return the seconds of all decompositions. ``twice``: their errors are looked at entry by entry, too."""

        def decompose(layer: Outline) -> None:
            spectrum = self.decomposer.spectrum(layer.module, moments.get(layer.name, NO_MOMENTS))
            if twice:
                spectrum.largest_entry()

        return _extrapolated(self.layers, lambda layer: layer.decomposition, decompose)

    def fits(self, ranks: Mapping[str, int], by: RefitBy, positions: Mapping[str, float]) -> float:
        """Return the seconds in which all factors are fitted to given moments. ``positions``: that a layer sees."""

        def seconds(layers: Sequence[Outline], choosing: bool) -> float:
            return _extrapolated(
                layers,
                lambda layer: layer.matrices * layer.rows * layer.columns * (layer.rows + layer.columns),
                lambda layer: rehearse_fit(layer.factor(ranks[layer.name]), by, choosing),
            )

        def chooses(layer: Outline) -> bool:
            dense = DenseLayer.of(layer.module)
            return by == "loss" and few(positions.get(layer.name, 0), dense.sides(dense.view("channel"))[1])

        fitted = [layer for layer in self.layers if layer.name in ranks]
        return sum(seconds([layer for layer in fitted if chooses(layer) is own], own) for own in (True, False))

    def flows(self) -> dict[str, tuple[float, float]]:
        """Return, for each layer, the bytes that flow in and out and the number of its positions, for one sample."""
        found: dict[str, tuple[float, float]] = {}

        def passed(name: str, rows: int, _: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            nbytes = first_argument(args, kwargs).nbytes + output.nbytes
            found[name] = nbytes / self.count, output.numel() / rows / self.count

        hooks = [
            (layer.module, partial(passed, layer.name, DenseLayer.of(layer.module).outputs)) for layer in self.layers
        ]
        with hooked(after=hooks), evaluating(self.model), torch.no_grad():
            forward(self.model, to_device(self.batch[0], device_of(self.model)))
        return found

    def refit_bytes(self, ranks: Mapping[str, int]) -> int:
        """Return the bytes of the second moments and of the search with which the largest layer is refitted."""
        most = 0
        for layer in self.layers:
            dense = DenseLayer.of(layer.module)
            rows, columns = dense.sides(dense.view("channel"))
            factors = ranks.get(layer.name, 0) * layer.component
            most = max(most, 8 * (dense.groups * columns * (9 * columns + 6 * rows) + 25 * factors))
        return most

    def weighing_bytes(self) -> int:
        """Return the bytes of the second moments by which a refit weighs the outputs of all layers."""
        denses = [DenseLayer.of(layer.module) for layer in self.layers]
        return sum(8 * dense.groups * dense.sides(dense.view("channel"))[0] ** 2 for dense in denses)

    def refit_moments(self, samples: int, flows: Mapping[str, tuple[float, float]]) -> float:
        """Return the seconds in which a refit takes the second moments of all layers."""
        operations = 0.0
        for layer in self.layers:
            dense, positions = DenseLayer.of(layer.module), samples * flows.get(layer.name, (0, 0))[1]
            rows, columns = dense.sides(dense.view("channel"))
            if isinstance(layer.module, nn.Conv2d):
                positions = min(positions, POSITIONS)
            pairs = columns**2
            if positions < POSITIONS and is_wide(layer.module):
                pairs = dense.inputs**2 * shifts(dense.kernel)
            operations += 2 * dense.groups * positions * (columns * rows + pairs)
        return operations * _seconds_of_a_product()

    def _of_one_batch(self) -> Objective:
        return self.objective.on({"calibration": [self.batch]})


class _Saved:
    """The bytes that a forward pass saves for the backward pass, each storage once, beside the weights of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {own.untyped_storage().data_ptr() for own in model.parameters()}
        self._sizes: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def counting(self) -> Any:
        """Return a context in which they are counted."""

        def noted(tensor: Tensor) -> Tensor:
            for storage in (part.untyped_storage() for part in plain_parts(tensor)):
                if storage.data_ptr() not in self._weights:
                    self._sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor)


def _seconds_of_a_product() -> float:
    """Return the seconds that one operation of a matrix product takes, in single precision."""
    x = torch.randn(768, 768)
    return _seconds(lambda: x @ x) / (2 * len(x) ** 3)


def _seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of ``call``: the median of three, or of one that is long."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < SECONDS / 2:
        began = clock()
        call()
        times.append(clock() - began)
    return median(times)


def _extrapolated(
    layers: Sequence[Outline], operations: Callable[[Outline], float], call: Callable[[Outline], None]
) -> float:
    """Return the seconds of ``call`` on all layers: of the small ones measured, of others by their operations.

    Layers of one shape are measured once. The seconds grow as the power ``GROWTH`` of the operations.
    """
    shapes: dict[tuple, list[Outline]] = {}
    for layer in sorted(layers, key=operations):
        key = (layer.form, layer.matrices, layer.rows, layer.columns, layer.moments)
        shapes.setdefault(key, []).append(layer)
    spent, total, largest, rate = 0.0, 0.0, 1.0, 0.0
    for alike in shapes.values():
        if spent < SECONDS:
            began = clock()
            call(alike[0])
            seconds = clock() - began
            spent, rate, largest = spent + seconds, seconds, max(operations(alike[0]), 1.0)
        else:
            seconds = rate * (operations(alike[0]) / largest) ** GROWTH
        total += len(alike) * seconds
    return total
