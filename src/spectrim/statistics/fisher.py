"""Per-sample gradients of the loss by a gate on every singular component: the first order and the Fisher information.

A gate g_i = 1 on component i makes a layer ``W = sum_i g_i b_i a_i^T``. Removing the component is the step g_i: 1 → 0.
Its derivative is the inner product of what flows through the component with the gradient that comes back. Both lie
between the two factors, so one backward pass gives all gates of all layers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import aliased, are_samples, device_of, evaluating, forward, sample_count, tensors_of, to_device
from spectrim.errors import UserError
from spectrim.factored.dense import with_article
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear
from spectrim.factored.tied import TiedLinear
from spectrim.losses import SpanLoss, have_scores
from spectrim.statistics.backward import Start, detached, gradients_at, start_at
from spectrim.statistics.batch_loss import batch_weight, finite_loss, has_gradient
from spectrim.statistics.directions import generator_of, random_direction
from spectrim.statistics.gate_rows import OUTSIDE, GateRows, Weighed
from spectrim.statistics.objective import NoGradient, Objective
from spectrim.statistics.processes import Processes
from spectrim.statistics.split_reader import Batch
from spectrim.statistics.switched_off import SWITCHED_OFF, SwitchedOff
from spectrim.surgery.tied import tied_layers
from spectrim.tools import resume
from spectrim.tools.hooks import hooked
from spectrim.tools.trainable import alone_trainable

OF_BATCH = (
    "the loss reads an output that belongs to the whole batch, as where the model computes its loss itself; give "
    "loss=, a function of the scores and the targets, or batches of one sample"
)


class GateGradients(NamedTuple):
    """Gate gradients of one layer, float32 on the CPU. Rows are samples, columns components: shape (N, R) each.

    ``given``: of the loss at the given targets. Its mean is the first-order change. No rows where it is not asked for.
    ``fisher``: along a random direction in the space of the scores (``losses.fisher_direction``). With J these rows,
    ``F = J^T J / N`` is the Fisher information of cross-entropy (Amari 1998; Kunstner et al., arXiv 1905.12558, on why
    not the given targets). Where the outputs are not class scores, these are the given ones.

    A row of a language model sums over the tokens of its sequence, each with a direction of its own. The directions of
    two tokens are independent, so cross terms vanish in expectation. The rows are scaled so that ``F`` is that of the
    mean over tokens.
    """

    given: Tensor
    fisher: Tensor


class Gates(NamedTuple):
    """Gate gradients by layer, and why each layer without any has none."""

    rows: dict[str, GateGradients]
    left: dict[str, str]

    def as_result(self) -> resume.Result:
        """Return tensors and texts, for a file."""
        return resume.Result(
            {f"{kind}:{name}": part for name, own in self.rows.items() for kind, part in own._asdict().items()},
            {f"left:{name}": why for name, why in self.left.items()},
        )

    @classmethod
    def of_result(cls, result: resume.Result, layers: Sequence[str]) -> "Gates":
        """Return what ``as_result`` was called on."""
        kept, found = [name for name in layers if f"fisher:{name}" in result.tensors], result.tensors
        rows = {name: GateGradients(found[f"given:{name}"], found[f"fisher:{name}"]) for name in kept}
        return cls(rows, {name.removeprefix("left:"): why for name, why in result.texts.items()})


def gate_gradients(
    model: nn.Module,
    layers: Sequence[str],
    objective: Objective,
    samples: int,
    seed: int = 0,
    first_order: bool = True,
) -> Gates:
    """Return the gate gradients of the factored ``layers`` of ``model`` on the calibration split.

    Which dimension of a layer holds the samples is found from the gradients (``sample_rows``). A layer whose rows
    several samples share is left out, as is one that the loss does not depend on. A batch that does not reach a layer,
    as with experts, counts zero there. A gate of an embedding also scales the layers that share its factors. With
    ``objective.layers_at_once`` each block of layers takes a backward pass of its own, in the order given.

    They are taken up from the folder of ``resume`` where it holds them.

    ``samples``: number of calibration samples to read, in whole batches.
    ``seed``: of the random directions of the scores.
    ``first_order``: whether ``given`` is asked for.

    Raises ``UserError`` for an empty calibration split, a loss that is not finite, or a layer whose form has no gates,
    and ``NoGradient`` for a loss without a gradient.
    """

    def made() -> Gates:
        return _gate_gradients(model, layers, objective, samples, seed, first_order)

    folder = resume.current()
    if folder is None:
        return made()
    key = [list(layers), samples, seed, first_order, [list(block) for block in objective.blocks(layers)]]
    found = objective.resumed(folder, "gates", model, "calibration", lambda: made().as_result(), key, samples)
    return Gates.of_result(found, layers)


def _gate_gradients(
    model: nn.Module, layers: Sequence[str], objective: Objective, samples: int, seed: int, first_order: bool
) -> Gates:
    """Compute ``gate_gradients``."""
    processes = objective.processes("calibration")
    objective, generator = generator_of(model, objective, samples, seed)
    modules = {name: model.get_submodule(name) for name in layers}
    gates, ties = GateRows(modules, objective.blocks(layers)), tied_layers(model)
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
        (_first(place, model.get_submodule(place)), gates.keeping(name))
        for name in layers
        for place in (name, *ties.get(name, ()))  # one gate for all uses of a weight
    ]
    off = SwitchedOff()
    hooks += [(_first(name, modules[name]), off.noting(name)) for name in layers]
    parts: dict[str, list[GateGradients]] = {name: [] for name in layers}
    sizes: list[tuple[int, int]] = []  # of each batch: its samples, and its weight in the mean loss
    differentiable = False
    with hooked(after=hooks), evaluating(model), torch.enable_grad(), alone_trainable(model, ()):
        for batch in objective.first("calibration", samples, "linearise"):
            sizes.append((sample_count(batch[1], batch[0]), batch_weight(objective.loss, batch[1], batch[0])))
            given, along, flat = _rows_of_batch(model, gates, objective, batch, generator, first_order)
            differentiable |= not flat
            for name, module in modules.items():
                own, at_targets = (_of_gates(rows[name], module.rank) for rows in (along, given))
                parts[name].append(GateGradients(at_targets if first_order else own[:0], own))
    if not processes.add_up(torch.tensor(int(differentiable))):
        raise NoGradient
    gates.agree(processes)
    left = gates.left()
    left |= {name: SWITCHED_OFF for name in processes.in_any(off.layers, layers) if left.get(name) == OUTSIDE}
    _as_in_mean(parts.values(), sizes, processes)
    rows = {
        name: GateGradients(*(processes.gather(torch.cat(rows)) for rows in zip(*own, strict=True)))
        for name, own in parts.items()
    }
    return Gates({name: own for name, own in rows.items() if name not in left}, left)


def _rows_of_batch(
    model: nn.Module,
    gates: GateRows,
    objective: Objective,
    batch: Batch,
    generator: torch.Generator,
    first_order: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """Return the rows of a batch at the given targets and along a random direction; the same ones without scores.

    The third is whether all are zero, because the loss has no gradient by the outputs.

    All that the way back needs is let go of when this ends, before the next batch.
    """
    device, count = device_of(model), sample_count(batch[1], batch[0])
    inputs, targets = (to_device(part, device) for part in batch)
    outputs = aliased(forward(model, detached(inputs)))
    value = finite_loss(objective.loss, outputs, targets, "calibration")
    loss = _by_outputs(value * count, outputs, count)
    scores = _along_scores(objective, outputs, targets, generator, count)
    flat = not (scores or value.requires_grad or has_gradient(objective.loss, outputs, targets))
    along = gates.rows(scores or loss, count, keep=first_order and scores is not None)
    given = gates.rows(loss, count) if first_order and scores is not None else along
    gates.forget()
    return given, along, flat


def _as_in_mean(parts: Iterable[list[GateGradients]], sizes: Sequence[tuple[int, int]], processes: Processes) -> None:
    """Scale the rows of each batch, which are those of its own mean loss, to the mean over all batches.

    A sample of a batch with more predicted tokens a sample counts for more there.
    ``sizes``: samples and weight of each batch.
    """
    samples, weight = processes.add_up(torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).sum(0)).tolist()
    for own in parts:
        for rows, (count, of_batch) in zip(own, sizes, strict=True):
            if of_batch * samples != weight * count:
                scale = of_batch * samples / (weight * count)
                rows.given.mul_(scale)
                rows.fisher.mul_(math.sqrt(scale))


def _first(name: str, module: nn.Module) -> nn.Module:
    if not isinstance(module, FactoredLinear | FactoredEmbedding | TiedLinear | FactoredConv2d):
        kind, instead = type(module).__name__, "decompose by an SVD, or let an algorithm choose ranks"
        raise UserError(f"layer {name}: a {kind} is cut to a rank, its components have no gates; {instead}")
    return module.first


def _along_scores(
    objective: Objective, outputs: Any, targets: Any, generator: torch.Generator, count: int
) -> Weighed | None:
    """Return where to start along random directions of the scores, as a function of weights; None without scores.

    The directions are drawn anew, the same ones, each time that they are asked for: they are as large as the scores.
    """
    if not have_scores(objective.loss, outputs, targets):
        return None
    drawn = generator.get_state()

    def owners(rows: int) -> Tensor:
        if isinstance(objective.loss, SpanLoss):  # the starts of all samples, then the ends
            return torch.arange(rows) % count
        return torch.arange(rows) * count // rows  # flattened scores hold the tokens of a sample together

    def weighed(weights: Tensor | None) -> list[Start]:
        generator.set_state(drawn)
        along = random_direction(objective.loss, outputs, targets, generator)
        assert along is not None
        rows, scale = len(along.gradient), math.sqrt(count / along.predictions)
        factors = torch.full((rows,), scale) if weights is None else weights[owners(rows)] * scale
        along.gradient.mul_(factors.to(along.gradient).view(-1, *[1] * (along.gradient.ndim - 1)))
        return start_at(along.values, along.gradient)

    return weighed


def _by_outputs(loss: Tensor, outputs: Any, count: int) -> Weighed:
    """Return where to start: without weights at the loss, with them at the outputs.

    The gradient at the outputs of a sample is then the loss's own times the sample's weight. Outputs may be a sequence
    with an item a sample, as those of a detector are, or be flattened, with the tokens of a sample together. Weights do
    nothing to an output that belongs to the whole batch. With weights it raises ``UserError`` where the loss reads such
    outputs alone.
    """
    by_sample = isinstance(outputs, list | tuple) and are_samples(outputs, count)
    owners = {id(own): index for index, item in enumerate(outputs if by_sample else ()) for own in tensors_of(item)}
    tensors = [tensor for tensor in tensors_of(outputs) if tensor.requires_grad]

    def weighed(weights: Tensor | None) -> list[Start]:
        if weights is None:
            return start_at(loss)
        if not tensors:
            raise UserError(
                f"the outputs are {with_article(outputs)} in which no tensor is found; "
                "let the model return tensors, in a tuple, a mapping or a dataclass"
            )
        starts, of_samples = list[Start](), False
        gradients = gradients_at(loss, tensors, keep=True)
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                axis = next((axis for axis, size in enumerate(tensor.shape) if size == count), None)
                flat = tensor.ndim > 0 and len(tensor) % count == 0
                of_samples |= by_sample or axis is not None or flat
                if by_sample:
                    gradient = gradient * weights[owners[id(tensor)]].to(gradient)
                elif axis is not None:
                    gradient = (gradient.movedim(axis, -1) * weights.to(gradient)).movedim(-1, axis)
                elif flat:
                    own = weights.to(gradient).repeat_interleave(len(tensor) // count)
                    gradient = gradient * own.view(-1, *[1] * (tensor.ndim - 1))
                starts += start_at(tensor, gradient)
        if starts and not of_samples:
            raise UserError(OF_BATCH)
        return starts

    return weighed


def _of_gates(rows: Tensor, rank: Any) -> Tensor:
    """Sum channels to components: a component has one channel in every group."""
    return rows.reshape(len(rows), -1, rank).sum(1)
