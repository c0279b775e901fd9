"""Per-sample gradients of the loss by a gate on every singular component: the first order and the Fisher information.

A gate g_i = 1 on component i makes a layer ``W = sum_i g_i b_i a_i^T``. Removing the component is the step g_i: 1 → 0.
Its derivative is the inner product of what flows through the component with the gradient that comes back. Both lie
between the two factors, so one backward pass gives all gates of all layers.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import (
    Inputs,
    alone_trainable,
    device_of,
    evaluating,
    forward,
    hooked,
    sample_count,
    tensors_of,
    to_device,
)
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear
from spectrim.losses import SpanLoss, TokenLoss, are_scores, fisher_direction, logits_of
from spectrim.statistics.batch_loss import finite_loss
from spectrim.statistics.objective import Objective
from spectrim.statistics.sample_rows import BATCH_FIRST, Layout, Owners, RowOwners, sample_weights, scattered


class GateGradients(NamedTuple):
    """Gate gradients of one layer, float32 on the CPU. Rows are samples, columns components: shape (N, R) each.

    ``given``: of the loss at the given targets. Its mean is the first-order change. No rows where it is not asked for.
    ``drawn``: of a random direction in the space of the scores (``losses.fisher_direction``). With J its rows,
    ``F = J^T J / N`` is the Fisher information of cross-entropy (Amari 1998; Kunstner et al., arXiv 1905.12558, on why
    not the given targets). Where the outputs are not class scores, these are the given ones.

    A row of a language model sums over the tokens of its sequence, each with a direction of its own. Two tokens have
    nothing in common in expectation, so a scale of the rows makes ``F`` that of the mean over tokens.
    """

    given: Tensor
    drawn: Tensor


class Gates(NamedTuple):
    """Gate gradients by layer, and why each layer without any has none."""

    rows: dict[str, GateGradients]
    left: dict[str, str]


MIXED = "its rows do not belong to one sample each, so no gradient a sample can be taken"
OUTSIDE = "the calibration loss does not depend on it"


def gate_gradients(
    model: nn.Module,
    layers: Sequence[str],
    objective: Objective,
    samples: int,
    split: str = "calibration",
    seed: int = 0,
    first_order: bool = True,
) -> Gates:
    """Return the gate gradients of the factored ``layers`` of ``model``, over whole batches until ``samples``.

    Which dimension of a layer holds the samples is found from the gradients (``sample_rows``). A layer whose rows
    several samples share is left out, as is one that the loss does not depend on. A batch that does not reach a layer,
    as with experts, counts zero there. With ``objective.layers_at_once`` each block of layers takes a backward pass of
    its own, in the order given.

    Raises ``UserError`` for an empty split, a loss that is not finite, or a layer whose form has no gates.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    gates = _Gates(modules, objective.blocks(layers))
    handles = [_first(name, module).register_forward_hook(gates.keeping(name)) for name, module in modules.items()]
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    parts: dict[str, list[GateGradients]] = {name: [] for name in layers}
    with hooked(handles), evaluating(model), torch.enable_grad(), alone_trainable(model, ()):
        for inputs, targets in objective.first(split, samples, "linearise"):
            count = sample_count(targets, inputs)
            outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
            loss = _by_outputs(finite_loss(objective.loss, outputs, targets, split) * count, outputs, count)
            scores = _along_scores(objective, outputs, targets, generator, count)
            drawn = gates.rows(scores or loss, count, keep=first_order and scores is not None)
            given = gates.rows(loss, count) if first_order and scores is not None else drawn
            for name, module in modules.items():
                own, at_targets = (_of_gates(rows[name], module.rank) for rows in (drawn, given))
                parts[name].append(GateGradients(at_targets if first_order else own[:0], own))
            gates.calls.clear()
    left = gates.left()
    rows = {name: GateGradients(*(torch.cat(rows) for rows in zip(*own, strict=True))) for name, own in parts.items()}
    return Gates({name: own for name, own in rows.items() if name not in left}, left)


def _first(name: str, module: nn.Module) -> nn.Module:
    if not isinstance(module, FactoredLinear | FactoredEmbedding | FactoredConv2d):
        kind, instead = type(module).__name__, "decompose by an SVD, or let an algorithm choose ranks"
        raise UserError(f"layer {name}: a {kind} is cut to a rank, its components have no gates; {instead}")
    return module.first


# The quantity to differentiate, given one weight a sample (None: no weights).
Weighed = Callable[[Tensor | None], Tensor]


def _along_scores(
    objective: Objective, outputs: Any, targets: Any, generator: torch.Generator, count: int
) -> Weighed | None:
    """The scores along a random direction; None where the outputs are no scores."""
    scores = _scores(objective, outputs, targets)
    if scores is None:
        return None
    along, scale = scores * fisher_direction(scores, generator), math.sqrt(count / len(scores))
    owners = _owners_of_scores(objective, targets, len(scores), count)

    def weighed(weights: Tensor | None) -> Tensor:
        if weights is None:
            return along.sum() * scale
        return (along * weights.to(along.device)[owners.to(along.device)].unsqueeze(-1)).sum() * scale

    return weighed


def _scores(objective: Objective, outputs: Any, targets: Any) -> Tensor | None:
    """One row of scores a prediction, with at least one a sample; None where the outputs are no scores."""
    if isinstance(objective.loss, TokenLoss | SpanLoss):
        return objective.loss.predictions(outputs, targets)
    return logits_of(outputs).float() if are_scores(outputs, targets) else None


def _owners_of_scores(objective: Objective, targets: Any, rows: int, count: int) -> Tensor:
    """The sample of every row of scores. int64 of shape (rows,)."""
    if isinstance(objective.loss, TokenLoss):
        return objective.loss.predicted(targets).nonzero()[:, 0]
    if isinstance(objective.loss, SpanLoss):
        return torch.arange(rows) % count
    return torch.arange(rows) // (rows // count)


def _by_outputs(loss: Tensor, outputs: Any, count: int) -> Weighed:
    """The loss itself; with weights, its gradient by the outputs of every sample is weighed.

    Where the outputs do not say which dimension holds the samples, the weights change nothing: no layer is then found
    to keep its samples apart.
    """
    tensors = [tensor for tensor in tensors_of(outputs) if tensor.requires_grad]

    def weighed(weights: Tensor | None) -> Tensor:
        if weights is None:
            return loss
        total = loss * 0
        for tensor, gradient in zip(
            tensors, torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True), strict=True
        ):
            if gradient is not None:
                axis = next((axis for axis, size in enumerate(tensor.shape) if size == count), None)
                if axis is not None:
                    gradient = (gradient.movedim(axis, -1) * weights.to(gradient)).movedim(-1, axis)
                total = total + (tensor * gradient).sum()
        return total

    return weighed


@dataclass(eq=False)
class _Call:
    """One call of a layer in one batch: what flows between its factors, and whose rows they are."""

    name: str
    value: Tensor
    axis: int  # of the channels
    known: RowOwners
    owners: Owners | None = None  # None: not known yet, or none

    def plain(self, gradient: Tensor) -> Tensor:
        """Return ``gradient`` with the channels last."""
        return gradient.movedim(self.axis, -1)

    def by_sample(self, gradient: Tensor, count: int) -> Tensor:
        """Return the sum of value times gradient over the rows of each sample. float32 of shape (count, channels)."""
        product = (self.value.detach() * gradient).float()
        if self.owners == BATCH_FIRST and (self.axis == -1 or product.ndim == 4):
            product = product.sum((2, 3)) if self.axis != -1 else product
            return product.reshape(count, -1, product.shape[-1]).sum(1).cpu()
        product = self.plain(product)
        owners = self.owners.owners(product.shape[:-1], count) if isinstance(self.owners, Layout) else self.owners
        assert owners is not None
        rows = product.new_zeros(count, product.shape[-1])
        return rows.index_add_(0, owners.to(rows.device).flatten(), product.reshape(-1, product.shape[-1])).cpu()


class _Gates:
    """The calls of every layer in a batch, and what is known of the layers so far."""

    def __init__(self, modules: Mapping[str, nn.Module], blocks: Sequence[Sequence[str]]) -> None:
        self.modules, self.blocks = modules, blocks
        self.calls: dict[str, list[_Call]] = {}
        self.known = defaultdict[tuple[str, int], RowOwners](RowOwners)
        self.reached, self.mixed = set[str](), set[str]()

    def keeping(self, name: str) -> Callable[[nn.Module, Inputs, Tensor], Tensor]:
        """Return a hook that keeps what lies between the two factors of layer ``name`` at each of its calls."""
        axis = -3 if isinstance(self.modules[name], FactoredConv2d) else -1

        def hook(_: nn.Module, __: Inputs, output: Tensor) -> Tensor:
            if not output.requires_grad:  # every parameter before it is frozen
                output = output.detach().requires_grad_(True)
            calls = self.calls.setdefault(name, [])
            calls.append(_Call(name, output, axis, self.known[name, len(calls)]))
            return output

        return hook

    def rows(self, weighed: Weighed, count: int, keep: bool = False) -> dict[str, Tensor]:
        """Return the gradient by a gate a sample on every channel between the factors: (count, channels) a layer.

        A layer that the model calls several times has one gate for all of its calls. Where it is not called, or the
        loss does not depend on it, the gradient is zero.
        """
        rows = {name: torch.zeros(count, _channels(module)) for name, module in self.modules.items()}
        for block in self.blocks:
            calls = [call for name in block if name not in self.mixed for call in self.calls.get(name, ())]
            for call, gradient in self._differentiated(calls, weighed, count, keep or block is not self.blocks[-1]):
                self.reached.add(call.name)
                if call.owners is None:
                    self.mixed.add(call.name)
                else:
                    rows[call.name] += call.by_sample(gradient, count)
        return rows

    def left(self) -> dict[str, str]:
        """Return why each layer without gates has none."""
        outside = {name: OUTSIDE for name in self.modules if name not in self.reached}
        return outside | dict.fromkeys(sorted(self.mixed), MIXED)

    def _differentiated(
        self, calls: list[_Call], weighed: Weighed, count: int, keep: bool
    ) -> list[tuple[_Call, Tensor]]:
        """Find the owners of the rows of every call. Return the calls with a gradient that is not zero."""
        for call in calls:
            if call.owners is None:
                call.owners = call.known.trusted(call.plain(call.value).shape[:-1], count)
        keep_for_check = keep or any(call.owners is None for call in calls)
        found = _gradients(weighed(None), calls, keep_for_check)
        weights = [sample_weights(count, draw) for draw in range(2)]
        unknown = {call: [gradient] for call, gradient in found.items() if call.owners is None}
        for own in weights:  # the second only for calls whose samples lie along no dimension
            if not unknown:
                break
            for call, gradient in _gradients(weighed(own), list(unknown), keep=True).items():
                unknown[call].append(gradient)
            for call, (plain, *weighted) in list(unknown.items()):
                if len(weighted) == 1:
                    call.owners = call.known.settle(call.plain(plain), call.plain(weighted[0]), own)
                else:
                    call.owners = scattered(call.plain(plain), [call.plain(one) for one in weighted], weights)
                if call.owners is not None:
                    del unknown[call]
        return list(found.items())


def _gradients(quantity: Tensor, calls: Sequence[_Call], keep: bool) -> dict[_Call, Tensor]:
    """Return the gradients by what flows in ``calls``, without those that are zero."""
    if not calls or not quantity.requires_grad:
        return {}
    values = [call.value for call in calls]
    gradients = torch.autograd.grad(quantity, values, retain_graph=keep, allow_unused=True)
    pairs = zip(calls, gradients, strict=True)
    return {call: gradient for call, gradient in pairs if gradient is not None and gradient.any()}


def _channels(module: nn.Module) -> int:
    """Return the number of channels between the factors of ``module``."""
    first: Any = module.first
    return first.embedding_dim if isinstance(first, nn.Embedding) else len(first.weight)


def _of_gates(rows: Tensor, rank: Any) -> Tensor:
    """Sum channels to components: a component has one channel in every group."""
    return rows.reshape(len(rows), -1, rank).sum(1)
