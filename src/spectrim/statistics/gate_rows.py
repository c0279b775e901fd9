"""Gradients by the gates of every layer, a row a sample, from what flows between the factors.

A gate scales what flows through one channel between the two factors. Its derivative is therefore the inner product of
that flow with its gradient, over the rows that belong to the sample (``sample_rows``). Once it is known whose the rows
are, it is taken as the gradient comes by. So the gradients of all layers are never in memory together.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.factored.layers import FactoredConv2d
from spectrim.statistics.backward import Leaves, Start
from spectrim.statistics.processes import Processes
from spectrim.statistics.sample_rows import BATCH_FIRST, Layout, Owners, RowOwners, sample_weights, scattered
from spectrim.tools.precision import wide

MIXED = (
    "its rows do not belong to one sample each, so a sample has no gradient; give batches of one, samples first, or "
    "take an algorithm that needs none, such as knapsack"
)
OUTSIDE = "the calibration loss does not depend on it"

# Where backward passes start, given one weight a sample (None: no weights).
Weighed = Callable[[Tensor | None], list[Start]]


@dataclass(eq=False)
class _Call:
    """One call of a layer in one batch: what flows between its factors, and whose rows they are.

    ``value``: what flows, without its history, or the call would keep itself alive.
    ``receive``: what takes the gradient by ``value`` when it comes by; None: nothing.
    ``gradients``: those that are held until the owners are known.
    """

    name: str
    value: Tensor
    axis: int  # of the channels
    known: RowOwners
    owners: Owners | None = None  # None: not known yet, or none
    receive: Callable[[Tensor], None] | None = None
    gradients: list[Tensor] = field(default_factory=list)
    rows: Tensor | None = None  # by sample; None where the gradient is zero

    def catch(self, gradient: Tensor) -> None:
        """Take the gradient that comes by."""
        if self.receive is not None and gradient.any():
            self.receive(gradient.detach())

    def channels_last(self, values: Tensor) -> Tensor:
        """Return ``values`` with the channels last."""
        return values.movedim(self.axis, -1)

    def reduce(self, count: int, gradient: Tensor) -> None:
        """Sum value times gradient over the rows of each sample. float32 of shape (count, channels)."""
        self.rows = self._by_sample(gradient, count)

    def _by_sample(self, gradient: Tensor, count: int) -> Tensor:
        product = (wide(self.value) * wide(gradient)).float()
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
        self.leaves = Leaves()
        self.known = defaultdict[tuple[str, int], RowOwners](RowOwners)
        self.reached, self.mixed = set[str](), set[str]()

    def keeping(self, name: str) -> Callable[..., Tensor]:
        """Return a hook that keeps what lies between the two factors of layer ``name`` at each of its calls."""
        axis = -3 if isinstance(self.modules[name], FactoredConv2d) else -1

        def hook(_: nn.Module, __: tuple, ___: dict[str, Any], output: Tensor) -> Tensor:
            output = self.leaves.reached(output)
            calls = self.calls.setdefault(name, [])
            calls.append(_Call(name, output.detach(), axis, self.known[name, len(calls)]))
            output.register_hook(self.leaves.receiving(calls[-1].catch))
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
            self._differentiate(calls, weighed, count, keep or block is not self.blocks[-1])
            for call in calls:
                if call.rows is not None:
                    rows[call.name] += call.rows
                call.rows = None
        return rows

    def forget(self) -> None:
        """Forget the batch."""
        self.calls.clear()
        self.leaves.forget()

    def agree(self, processes: Processes) -> None:
        """Take over what other processes know of layers: reached where any reached it, mixed where any found it so."""
        names = sorted(self.modules)
        self.reached, self.mixed = (set(processes.in_any(own, names)) for own in (self.reached, self.mixed))

    def left(self) -> dict[str, str]:
        """Return why each layer without gates has none."""
        outside = {name: OUTSIDE for name in self.modules if name not in self.reached}
        return outside | dict.fromkeys(sorted(self.mixed), MIXED)

    def _differentiate(self, calls: list[_Call], weighed: Weighed, count: int, keep: bool) -> None:
        """Take the rows of ``calls`` where they are not zero, and find the owners of those that are not known."""
        for call in calls:
            if call.owners is None:
                call.owners = call.known.trusted(call.channels_last(call.value).shape[:-1], count)
            call.receive = call.gradients.append if call.owners is None else partial(call.reduce, count)
        unsure = any(call.owners is None for call in calls)
        self._flow_back(calls, weighed(None), keep or unsure)
        self.reached |= {call.name for call in calls if call.gradients or call.rows is not None}
        self._find_owners([call for call in calls if call.gradients], weighed, count)

    def _find_owners(self, calls: list[_Call], weighed: Weighed, count: int) -> None:
        """Give each call the owners that explain its gradients under two weightings of the samples, if any do."""
        weights = [sample_weights(count, draw) for draw in range(2)]
        for call in calls:
            call.receive = partial(self._settle, call, weights)
        self._flow_back(calls, weighed(weights[0]) if calls else [], keep=True)
        left = [call for call in calls if len(call.gradients) > 1]  # its samples lie along no dimension
        for call in left:
            call.receive = partial(self._scatter, call, weights)
        self._flow_back(left, weighed(weights[1]) if left else [], keep=True)
        self.mixed |= {call.name for call in calls if call.owners is None}
        for call in calls:
            call.gradients.clear()

    def _settle(self, call: _Call, weights: Sequence[Tensor], weighted: Tensor) -> None:
        """Take the layout that explains the ``weighted`` gradient, and the rows; or hold this gradient as well."""
        plain = call.gradients[0]
        call.owners = call.known.settle(call.channels_last(plain), call.channels_last(weighted), weights[0])
        if call.owners is None:
            call.gradients.append(weighted)
        else:
            call.reduce(len(weights[0]), call.gradients.pop())

    def _scatter(self, call: _Call, weights: Sequence[Tensor], weighted: Tensor) -> None:
        """Take the owners that explain both weighted gradients, and the rows."""
        plain, first = map(call.channels_last, call.gradients)
        call.owners = scattered(plain, [first, call.channels_last(weighted)], weights)
        if call.owners is not None:
            call.reduce(len(weights[0]), call.gradients[0])

    def _flow_back(self, calls: Sequence[_Call], starts: Sequence[Start], keep: bool) -> None:
        """Let each of ``calls`` receive its gradient once."""
        if calls:
            self.leaves.flow_back(starts, keep)
        for call in calls:
            call.receive = None


def _channels(module: nn.Module) -> int:
    """Return the number of channels between the factors of ``module``."""
    first: Any = module.first
    return first.embedding_dim if isinstance(first, nn.Embedding) else len(first.weight)
