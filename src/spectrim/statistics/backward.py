"""Start a backward pass from a quantity, or from a tensor and the gradient at it, and let it reach what is hooked."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from spectrim.batches import Inputs, with_tensors
from spectrim.errors import UserError, first_line


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


def gradients_at(
    outputs: Any, leaves: Sequence[Tensor], given: Sequence[Tensor] | None = None, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradient of ``outputs`` by each of ``leaves``; None for one that they do not depend on.

    ``given``: the gradient at each of ``outputs``; None: 1, where they are a scalar.
    ``keep``: whether the graph is kept for another pass.

    Raises ``UserError`` where the model allows no such pass, as with reentrant checkpoints.
    """
    try:
        return torch.autograd.grad(outputs, leaves, given, retain_graph=keep, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"no gradient flows back through the model: {first_line(error)}; if it takes checkpoints of its "
            "activations, switch them off or give use_reentrant=False"
        ) from error


class _Joined(torch.autograd.Function):
    """``_Joined.apply(output, leaf)`` is ``output``, by which a gradient comes on its way to ``leaf``, which gets none.

    A backward pass visits only what lies before its leaves. A model that makes activations require a gradient, as those
    of transformers do for checkpoints, has outputs that depend on no leaf of ours.
    """

    @staticmethod
    def forward(context: Any, output: Tensor, leaf: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return gradients[0], None


class Leaves:
    """Where a backward pass ends, so that the gradient comes by the outputs that ``reached`` has returned."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._joined: bool | None = None  # the model itself makes activations require a gradient; None: not known yet
        self._flowing = False

    def reached(self, output: Tensor) -> Tensor:
        """Return ``output``, or a tensor that equals it. No parameter of the model requires a gradient."""
        if output.is_inference():  # the model takes no gradient here, and such a tensor can have none
            output = output.clone()
        if self._joined is None:
            self._joined = output.requires_grad
        if not output.requires_grad:  # nothing is differentiated before it
            self.tensors.append(output.detach().requires_grad_(True))
            return self.tensors[-1]
        if not self._joined:
            return output
        self.tensors.append(output.new_zeros((), requires_grad=True))
        return _Joined.apply(output, self.tensors[-1])

    def receiving(self, receive: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """Return a hook of an output that takes the gradient of ``flow_back``.

        It raises ``UserError`` where the model itself, or the loss, takes a gradient through the output: that gradient
        is another, and a gate would have a part in it, too.
        """

        def hook(gradient: Tensor) -> None:
            if not self._flowing:
                raise UserError(
                    "the model takes gradients in its forward pass, so that no gate has a first order; take an "
                    "algorithm without gates, such as Lossless or Truncation"
                )
            receive(gradient)

        return hook

    def flow_back(self, starts: Sequence[Start], keep: bool = False) -> None:
        """Let the gradient flow from ``starts`` to the leaves, and through the hooks of all tensors between.

        ``keep``: whether the graph is kept for another pass.
        """
        if starts and self.tensors:
            edges, gradients = zip(*starts, strict=True)
            self._flowing = True
            try:
                gradients_at(edges, self.tensors, gradients, keep)
            finally:
                self._flowing = False

    def forget(self) -> None:
        """Forget the pass."""
        self.tensors.clear()
        self._joined = None
