"""Gradients by the gates of every layer, a row a sample, from what flows between the factors.

A gate scales what flows through one channel between the two factors. Its derivative is therefore the inner product of
that flow with its gradient, over the rows that belong to the sample (``sample_rows``).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d
from spectrim.statistics.processes import Processes
from spectrim.statistics.sample_rows import BATCH_FIRST, Layout, Owners, RowOwners, sample_weights, scattered

MIXED = "its rows do not belong to one sample each, so no gradient a sample can be taken"
OUTSIDE = "the calibration loss does not depend on it"

# The quantity to differentiate, given one weight a sample (None: no weights).
Weighed = Callable[[Tensor | None], Tensor]


@dataclass(eq=False)
class _Call:
    """One call of a layer in one batch: what flows between its factors, and whose rows they are."""

    name: str
    value: Tensor
    axis: int  # of the channels
    known: RowOwners
    owners: Owners | None = None  # None: not known yet, or none

    def channels_last(self, values: Tensor) -> Tensor:
        """Return ``values`` with the channels last."""
        return values.movedim(self.axis, -1)

    def by_sample(self, gradient: Tensor, count: int) -> Tensor:
        """Return the sum of value times gradient over the rows of each sample. float32 of shape (count, channels)."""
        product = (self.value.detach() * gradient).float()
        if self.owners == BATCH_FIRST and (self.axis == -1 or product.ndim == 4):
            product = product.sum((2, 3)) if self.axis != -1 else product
            return product.reshape(count, -1, product.shape[-1]).sum(1).cpu()
        product = self.channels_last(product)
        owners = self.owners.owners(product.shape[:-1], count) if isinstance(self.owners, Layout) else self.owners
        assert owners is not None
        rows = product.new_zeros(count, product.shape[-1])
        return rows.index_add_(0, owners.to(rows.device).flatten(), product.reshape(-1, product.shape[-1])).cpu()


class GateRows:
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
            if not self.calls and output.requires_grad:  # no parameter does
                raise UserError(
                    "the model takes gradients in its forward pass, so that no gate has a first order; take an "
                    "algorithm without gates, such as Lossless or Truncation"
                )
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
            again = keep or block is not self.blocks[-1]
            for call, gradient in self._differentiated(calls, weighed, count, again).items():
                self.reached.add(call.name)
                if call.owners is None:
                    self.mixed.add(call.name)
                else:
                    rows[call.name] += call.by_sample(gradient, count)
        return rows

    def agree(self, processes: Processes) -> None:
        """Take over what other processes know of layers: reached where any reached it, mixed where any found it so."""
        names = sorted(self.modules)
        self.reached, self.mixed = (
            {
                name
                for name, any_of in zip(names, processes.any_of(name in own for name in names), strict=True)
                if any_of
            }
            for own in (self.reached, self.mixed)
        )

    def left(self) -> dict[str, str]:
        """Return why each layer without gates has none."""
        outside = {name: OUTSIDE for name in self.modules if name not in self.reached}
        return outside | dict.fromkeys(sorted(self.mixed), MIXED)

    def _differentiated(self, calls: list[_Call], weighed: Weighed, count: int, keep: bool) -> dict[_Call, Tensor]:
        """Return the gradients by what flows in ``calls``, where not zero, and find the owners of their rows."""
        for call in calls:
            if call.owners is None:
                call.owners = call.known.trusted(call.channels_last(call.value).shape[:-1], count)
        unsure = any(call.owners is None for call in calls)
        gradients = _gradients(weighed(None), calls, keep or unsure)
        self._find_owners([call for call in gradients if call.owners is None], gradients, weighed, count)
        return gradients

    def _find_owners(self, calls: list[_Call], gradients: Mapping[_Call, Tensor], weighed: Weighed, count: int) -> None:
        """Give each call the owners that explain its gradients under two weightings of the samples, if any do."""
        weights = [sample_weights(count, draw) for draw in range(2)]
        first = _gradients(weighed(weights[0]), calls, keep=True) if calls else {}
        for call, gradient in first.items():
            plain, weighted = call.channels_last(gradients[call]), call.channels_last(gradient)
            call.owners = call.known.settle(plain, weighted, weights[0])
        left = [call for call in first if call.owners is None]  # its samples lie along no dimension
        second = _gradients(weighed(weights[1]), left, keep=True) if left else {}
        for call, gradient in second.items():
            weighted_twice = [call.channels_last(own) for own in (first[call], gradient)]
            call.owners = scattered(call.channels_last(gradients[call]), weighted_twice, weights)


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
