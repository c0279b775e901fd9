"""Per-sample gradients of the loss by a gate on every singular component: the first order and the Fisher information.

A gate g_i = 1 on component i makes a layer ``W = sum_i g_i b_i a_i^T``. Removing the component is the step g_i: 1 → 0.
Its derivative is the inner product of what flows through the component with the gradient that comes back, both of which
lie between the two factors: one backward pass gives all gates of all layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, alone_trainable, device_of, evaluating, forward, hooked, sample_count, to_device
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear
from spectrim.losses import SpanLoss, TokenLoss, are_scores, fisher_direction, logits_of
from spectrim.statistics.objective import Objective


class GateGradients(NamedTuple):
    """Of one layer, float32 on the CPU: rows are samples, columns its components. Shape (N, R) each.

    ``given``: of the loss for the given targets, whose mean is the first order; no rows where that is not asked for.
    ``drawn``: of a random direction in the space of the scores (``losses.fisher_direction``), J with ``F = J^T J / N``
    the Fisher information of cross-entropy (Amari 1998; Kunstner et al., arXiv 1905.12558, on why not the given
    targets); the given ones serve where the outputs are not class scores. Of a language model a row adds up over the
    tokens of its sequence, each with a direction of its own: what two of them have in common is zero in expectation, so
    the rows are scaled for ``F`` to be that of the mean over tokens.
    """

    given: Tensor
    drawn: Tensor


def gate_gradients(
    model: nn.Module,
    layers: Sequence[str],
    objective: Objective,
    samples: int,
    split: str = "calibration",
    seed: int = 0,
    first_order: bool = True,
) -> dict[str, GateGradients]:
    """The gates of the factored ``layers`` of ``model``, over whole batches until ``samples`` are reached.

    With ``objective.layers_at_once`` a backward pass is made for each block of layers, in the order given.
    Raises ``UserError`` for an empty split, a loss that is not finite, a layer that mixes the samples of a batch, or a
    layer whose form has no gates.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    between: dict[str, list[Tensor]] = {}
    handles = [_first(name, module).register_forward_hook(_Keeping(between, name)) for name, module in modules.items()]
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    blocks = objective.blocks(layers)
    parts: dict[str, list[GateGradients]] = {name: [] for name in layers}
    with hooked(handles), evaluating(model), torch.enable_grad(), alone_trainable(model, ()):
        for inputs, targets in objective.first(split, samples, "linearise"):
            count = sample_count(targets)
            outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
            _require_each(between, layers)
            loss, scores = objective.finite_loss(outputs, targets, split) * count, _scores(objective, outputs, targets)
            given = drawn = _rows(loss, between, blocks, count, keep=True) if first_order or scores is None else {}
            if scores is not None:
                along = (scores * fisher_direction(scores, generator)).sum() * math.sqrt(count / len(scores))
                drawn = _rows(along, between, blocks, count)
            for name in layers:
                own = _of_gates(drawn[name], modules[name].rank)
                first = _of_gates(given[name], modules[name].rank) if first_order else own[:0]
                parts[name].append(GateGradients(first, own))
            between.clear()
    return {name: GateGradients(*(torch.cat(rows) for rows in zip(*own, strict=True))) for name, own in parts.items()}


class _Keeping:
    """A hook that keeps what lies between the two factors, at each call of the layer."""

    def __init__(self, between: dict[str, list[Tensor]], name: str) -> None:
        self.between, self.name = between, name

    def __call__(self, module: nn.Module, inputs: Inputs, output: Tensor) -> Tensor:
        if not output.requires_grad:  # every parameter before it is frozen
            output = output.detach().requires_grad_(True)
        self.between.setdefault(self.name, []).append(output)
        return output


def _first(name: str, module: nn.Module) -> nn.Module:
    if not isinstance(module, FactoredLinear | FactoredEmbedding | FactoredConv2d):
        kind, instead = type(module).__name__, "decompose by an SVD, or let an algorithm choose ranks"
        raise UserError(f"layer {name}: a {kind} is cut to a rank, its components have no gates; {instead}")
    return module.first


def _require_each(between: Mapping[str, list[Tensor]], layers: Sequence[str]) -> None:
    for name in layers:
        if name not in between:
            raise UserError(f"the model does not call layer {name} on every batch; its gradient cannot be taken")


def _scores(objective: Objective, outputs: Any, targets: Any) -> Tensor | None:
    """One row of scores a prediction, with at least one a sample; None where the outputs are no scores."""
    if isinstance(objective.loss, TokenLoss | SpanLoss):
        return objective.loss.predictions(outputs, targets)
    return logits_of(outputs).float() if are_scores(outputs, targets) else None


def _rows(
    loss: Tensor, between: Mapping[str, list[Tensor]], blocks: Sequence[Sequence[str]], count: int, keep: bool = False
) -> dict[str, Tensor]:
    """Of the summed loss, by a gate a sample on every channel between the factors: shape (count, channels).

    A layer that the model calls several times has one gate for all of its calls.
    """
    rows: dict[str, Tensor] = {}
    for block in blocks:
        again = keep or block is not blocks[-1]
        values = [(name, value) for name in block for value in between[name]]
        gradients = torch.autograd.grad(loss, [value for _, value in values], retain_graph=again)
        for (name, value), gradient in zip(values, gradients, strict=True):
            row = _row(name, value, gradient, count)
            rows[name] = rows[name] + row if name in rows else row
    return rows


def _row(name: str, value: Tensor, gradient: Tensor, count: int) -> Tensor:
    product = (value.detach() * gradient).float()
    if product.ndim == 4:
        product = product.sum((2, 3))
    if len(product) % count:
        raise UserError(f"layer {name} sees {len(product)} rows for {count} samples: it mixes the samples of a batch")
    return product.reshape(count, -1, product.shape[-1]).sum(1).cpu()


def _of_gates(rows: Tensor, rank: Any) -> Tensor:
    """Channels to components: a component has one channel in every group."""
    return rows.reshape(len(rows), -1, rank).sum(1)
