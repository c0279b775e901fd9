"""Start a backward pass from a quantity, or from a tensor and the gradient at it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from spectrim.batches import Inputs, with_tensors


def detached(inputs: Inputs) -> Inputs:
    """Return the same inputs without a gradient."""
    return with_tensors(inputs, Tensor.detach)


class Start(NamedTuple):
    """A place where a backward pass starts, and the gradient there. The tensor itself need not stay in memory."""

    edge: GradientEdge
    gradient: Tensor


def start_at(values: Tensor, gradient: Tensor | None = None) -> list[Start]:
    """Return where to start from ``values``; nothing where no gradient flows back from there.

    ``gradient``: at ``values``; None: 1, where they are a scalar.
    """
    if not values.requires_grad:
        return []
    gradient = torch.ones_like(values) if gradient is None else gradient.to(values.dtype)
    return [Start(get_gradient_edge(values), gradient)]


def flow_back(starts: Sequence[Start], leaves: Sequence[Tensor], keep: bool = False) -> None:
    """Let the gradient flow from ``starts`` to ``leaves``, and through the hooks of all tensors between.

    ``keep``: whether the graph is kept for another pass.
    """
    if starts and leaves:
        edges, gradients = zip(*starts, strict=True)
        torch.autograd.grad(edges, list(leaves), gradients, retain_graph=keep, allow_unused=True)
