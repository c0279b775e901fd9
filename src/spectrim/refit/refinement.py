"""Refine a compressed model: gradient steps without labels that bring its outputs closer to the dense ones."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, forward, to_device
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.refit.blocks import block_error, outputs_of, repeated_blocks
from spectrim.refit.distance import distance
from spectrim.refit.held_out import Batch, count_of, divided, order_of
from spectrim.refit.optimizer import Optimizer
from spectrim.statistics.objective import Objective
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.stand_ins import UNSTEADY, is_steady
from spectrim.tools import resume
from spectrim.tools.content import content, of_function, of_model
from spectrim.tools.live import Bar
from spectrim.tools.precision import HALVES
from spectrim.tools.settings import settings
from spectrim.tools.trainable import alone_trainable

PARTS = 4  # the distance is measured after each of so many equal parts of the steps
WARM_UP = 0.1  # part of the steps in which the learning rate rises

Augment = Callable[[Inputs, torch.Generator], Inputs]


@settings
class Refinement:
    """Steps on the factors towards the outputs of the dense model, without labels (Hinton et al., 1503.02531).

    The factors and biases of the factored layers are trained, and the weights and biases of every BatchNorm. The model
    stays in eval mode, so statistics of BatchNorm stay and nothing is dropped.

    A step lowers the distance of the outputs (``distance``), and with it the mean relative squared error of the blocks
    that the model repeats, where it repeats any (``blocks.repeated_blocks``). Calibration batches that no step reads
    are held out: the last fifth, or the last 1,000 samples where the steps read the train split. The distance on them
    is measured before the steps and after each quarter of them. The weights with the smallest one are kept, so the
    result is never farther from the dense model there than before.

    ``samples``: number of samples in all steps, each as often as it is read. A step reads one batch. The batches are
        held in memory. A split that is smaller is read several times, each time in another order.
    ``lr``: above 0. A step moves each matrix by ``lr sqrt(d)`` of its norm (``optimizer.Optimizer``). Here ``d`` is the
        distance before the steps, at most 1: the nearer the model, the shorter its steps. The rate rises in the first
        tenth of the steps and falls to 0 by a cosine.
    ``temperature``: above 0; divides class scores in the steps. Above 1, a step also hears classes that the dense model
        thinks unlikely, which matters where it knows the inputs by heart. What is held out is compared at 1.
    ``split``: the split that the steps read. No label of it is used.
    ``augment``: ``augment(inputs, generator)``, inputs of the same kind, changed at random by the generator of torch,
        as in the training of the model; None changes nothing.
    ``seed``: seed of the order of the batches and of ``augment``.
    """

    samples: int = 5000
    lr: float = 4e-3
    temperature: float = 4.0
    split: Literal["calibration", "train"] = "calibration"
    augment: Augment | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples of a refinement must be at least 1, got {self.samples}")
        for name, value in (("lr", self.lr), ("temperature", self.temperature)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} of a refinement must be a finite number above 0, got {value}")

    def require(self, model: nn.Module, objective: Objective) -> None:
        """Raise ``UserError`` where ``model`` cannot be refined on the splits of ``objective``."""
        objective.given(self.split)
        batches = len(list(itertools.islice(objective.batches("calibration"), 2)))
        if batches < (2 if self.split == "calibration" else 1):
            raise UserError("refine needs two calibration batches or more, since it holds some out; give smaller ones")
        if objective.processes("calibration").size > 1:
            raise UserError("refine works in one process; leave it out where several share the batches")
        small = [name for name, own in model.named_parameters() if own.dtype in HALVES]
        if small:
            raise UserError(f"refine needs float32 weights, and {small[0]} is 16 bit: give model.float(), or no refine")


class Refined(NamedTuple):
    """What a refinement did: an entry for the log of a selection, and notes. No entry: nothing was done."""

    entry: dict[str, Any] | None
    notes: list[str]


def refine(model: nn.Module, dense: nn.Module, objective: Objective, chosen: Refinement) -> Refined:
    """Refine ``model``, in place, towards ``dense`` by the settings ``chosen``.

    With a folder of ``resume``, each quarter of the steps is taken up where it was done before. A distance that is not
    finite ends the steps with a note. Raises ``UserError`` as ``Refinement.require`` does.
    """
    chosen.require(model, objective)
    weights = _trained(model)
    if not weights:
        return Refined(None, ["not refined: no layer is factored"])
    if not is_steady(dense, objective.example()):
        return Refined(None, [f"not refined: {UNSTEADY}"])
    began, loop = time.perf_counter(), _Steps(model, dense, objective, chosen, weights)
    with loop.ready():
        entry = loop.run()
    if not math.isfinite(entry["distance_before"]):
        return Refined(None, [f"not refined: the {loop.measure} on held-out inputs is {entry['distance_before']}"])
    before, after = entry["distance_before"], entry["distance_after"]
    text = f"refined by {entry['steps']} steps on {entry['inputs']} inputs, {entry['samples']} read in all: the"
    notes = [f"{text} {loop.measure} on {loop.held_count} others went from {before:.4g} to {after:.4g}", *loop.notes]
    return Refined({**entry, "seconds": round(time.perf_counter() - began, 2)}, notes)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    kinds = FactoredLayer, nn.modules.batchnorm._BatchNorm
    wanted = {id(own) for module in model.modules() if isinstance(module, kinds) for own in module.parameters()}
    if not any(isinstance(module, FactoredLayer) for module in model.modules()):
        return {}
    return {name: own for name, own in model.named_parameters() if id(own) in wanted}


class _Stopped(Exception):
    """Raised by a step after which none can follow; the text says which, and why."""


class _Steps:
    """The steps of one refinement. Each is given by its number, so that a later process may begin at any."""

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        objective: Objective,
        chosen: Refinement,
        weights: dict[str, nn.Parameter],
    ) -> None:
        self.model, self.dense, self.objective, self.chosen, self.weights = model, dense, objective, chosen, weights
        self.device, self.notes = device_of(model), list[str]()
        self.batches, self.held = divided(objective, chosen.split, chosen.samples)
        self.counts, self.held_count = list(map(count_of, self.batches)), sum(map(count_of, self.held))
        self.order = order_of(self.counts, chosen.samples, chosen.seed)
        self.folder = resume.current()
        self.depends = self._depends() if self.folder else ""
        self.optimizer: Optimizer
        self.measure = "distance"
        self.blocks: list[dict[str, Tensor]] = []  # what the blocks of both models put out in the last pass

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Let only the trained weights require a gradient, in eval mode, while the block runs."""
        blocks = repeated_blocks(self.model, self.dense)
        with ExitStack() as stack:
            stack.enter_context(unchanged(self.model, fitted=True))
            for model in (self.model, self.dense):
                stack.enter_context(evaluating(model))
                self.blocks.append(stack.enter_context(outputs_of(model, blocks)))
            stack.enter_context(alone_trainable(self.model, self.weights.values()))
            try:
                yield
            finally:
                for weight in self.weights.values():
                    weight.grad = None

    def run(self) -> dict[str, Any]:
        """Do the steps and leave the best weights in the model. Return what the log says of it."""
        before = nearest = self._held_distance()
        best, done = self._copy(), 0
        if not math.isfinite(before):
            return {"distance_before": before}
        self.optimizer = Optimizer(self.weights, self.chosen.lr * math.sqrt(min(before, 1)))
        bounds = [round(part * len(self.order) / PARTS) for part in range(PARTS + 1)]
        with Bar(desc="refine", total=len(self.order), unit="step", leave=False) as bar:
            for start, stop in itertools.pairwise(bounds):
                try:
                    self._resumed(range(start, stop), bar)
                except _Stopped as why:
                    self.notes.append(f"the refinement stopped at {why}")
                    break
                done, now = stop, self._held_distance()
                if now < nearest:
                    nearest, best = now, self._copy()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(best[name])
        read = self.order[:done]
        return {
            "steps": done,
            "inputs": sum(self.counts[index] for index in set(read)),
            "samples": sum(self.counts[index] for index in read),
            "distance_before": before,
            "distance_after": nearest,
        }

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def _resumed(self, steps: range, bar: Bar) -> None:
        """Do ``steps``, or take up what an earlier process did. Raises ``_Stopped`` as ``_do``, which keeps nothing."""
        read = self.objective.read[self.chosen.split]
        if self.folder is None:
            return self._do(steps, bar)

        def made() -> dict[str, Tensor]:
            self._do(steps, bar)
            return self.optimizer.state()

        inputs = [self.depends, steps, self.optimizer.state()]
        self.optimizer.load(resume.tensors("refinement", lambda: inputs, made))
        bar.update(steps.stop - bar.n)
        passed = sum(self.counts[index] for index in self.order[steps.start : steps.stop])
        self.objective.read[self.chosen.split] = read + passed  # as if done here

    def _depends(self) -> str:
        """Return a digest of all that the steps depend on, but for the weights that they have reached."""
        chosen = [getattr(self.chosen, name) for name in ("samples", "lr", "temperature", "seed")]
        about = [chosen, of_function(self.chosen.augment), self.order]
        return content(
            [about, of_model(self.model), of_model(self.dense), of_function(self.objective.loss), self.batches]
        )

    def _do(self, steps: range, bar: Bar) -> None:
        """Do ``steps``. Raises ``_Stopped`` where a distance is not finite or has no gradient."""
        for step in steps:
            inputs, targets = self._batch(step)
            self.objective.read[self.chosen.split] += self.counts[self.order[step]]
            with torch.enable_grad():
                found = self._distance(inputs, targets, self.chosen.temperature)
                if (between := block_error(*self.blocks)) is not None:
                    found = found + between
            if not found.requires_grad:
                raise _Stopped(f"step {step}: there is no gradient")
            if not math.isfinite(found.item()):
                raise _Stopped(f"step {step}: the distance became {found.item()}; lower lr")
            found.backward()
            self.optimizer.step(_shape((step + 1) / len(self.order)))
            bar.update()

    def _batch(self, step: int) -> Batch:
        inputs, targets = self.batches[self.order[step]]
        if self.chosen.augment is not None:
            inputs = self.chosen.augment(inputs, torch.Generator().manual_seed(self.chosen.seed * 100_003 + step))
        return inputs, targets

    def _distance(self, inputs: Inputs, targets: Any, temperature: float = 1.0) -> Tensor:
        inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
        for seen in self.blocks:
            seen.clear()
        with torch.no_grad():
            wanted = forward(self.dense, inputs)
        found, self.measure = distance(self.objective.loss, forward(self.model, inputs), wanted, targets, temperature)
        return found

    @torch.no_grad()
    def _held_distance(self) -> float:
        """Return the mean distance on the held-out batches, at least 0 or NaN."""
        self.objective.read["calibration"] += self.held_count
        total = sum(count_of(batch) * self._distance(*batch).item() for batch in self.held)
        return max(total / self.held_count, 0.0)  # a divergence near 0 may be below it by rounding


def _shape(progress: float) -> float:
    """Return the learning rate over its peak at ``progress``, in (0, 1]."""
    return min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2
