"""Greedy removal of components over all layers together, by predicted change of the loss per saved cost.

The prediction for a set of removed components d (entries 0 or -1) is ``c^T d + d^T F d / 2`` with the slope c and the
Fisher information ``F = J^T J / N``, which is never formed over layers: what it does to d is ``J^T (J d) / N``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# One component at a time up to twice as many gates, as small networks have; of a language model a dozen.
GATES_A_LOOK = 8192


@dataclass
class Gated:
    """One layer and its components still there, R of them.

    ``J_NR``: per-sample gate gradients. ``costs``: what the layer costs with k components, k = 0..R, rising; ``dense``:
    what it costs dense, which is what it is left as while its factors cost no less. ``slope_R``: first-order
    derivatives of the loss by the gates, as far as they are trusted; None: not at all.
    """

    J_NR: Tensor
    costs: Tensor
    dense: float
    slope_R: Tensor | None = None
    alone_R: Tensor = field(init=False)
    there: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.J_NR = self.J_NR.double()
        self.alone_R = self.J_NR.square().mean(0) / 2
        if self.slope_R is not None:
            self.alone_R -= self.slope_R
        self.there = torch.ones(self.J_NR.shape[1], dtype=torch.bool)

    @property
    def rank(self) -> int:
        return int(self.there.sum())

    @property
    def cost(self) -> float:
        return min(float(self.costs[self.rank]), self.dense)

    @property
    def factored(self) -> bool:
        return float(self.costs[self.rank]) < self.dense


class Move(NamedTuple):
    """Components to remove from one layer, in this order; the predicted change; the price, change per saved cost."""

    components: list[int]
    change: float
    price: float


NOTHING = Move([], 0.0, math.inf)


class Removal(NamedTuple):
    """What is left of each layer (indices into its components), and the predicted change of the loss."""

    kept: dict[str, Tensor]
    predicted: float


def remove(
    layers: Mapping[str, Gated], budget: float, refresh: int = 50, at_once: int = 0, interaction: float = 0.0
) -> Removal:
    """Remove components, the cheapest first, until the layers together cost no more than ``budget``.

    A factored layer gives up one component at a time. A dense layer gets nothing cheaper until enough of its components
    are gone: its move is the block of them with the lowest price, so that staying dense is weighed like anything else.
    Every layer keeps at least one component. ``refresh``: moves between two looks at the blocks of all dense layers;
    the one that is about to be made is always looked at anew. ``at_once``: components of factored layers, the cheapest,
    that go between two looks at what the others cost; 0: one in each ``GATES_A_LOOK`` gates, at least one.
    ``interaction``: the factor of the entries of F off its diagonal, what components do to one another.
    """
    state, moves = _State(layers, interaction), 0
    at_once = at_once or max(1, sum(layer.rank for layer in layers.values()) // GATES_A_LOOK)
    blocks: dict[str, Move] = {}
    while state.cost() > budget:
        if moves % refresh == 0:
            blocks = state.blocks()
        name, move = state.best_single()
        block = min(blocks, key=lambda dense: blocks[dense].price, default="")
        single = not block or blocks[block].price >= move.price
        if not single:
            price, name, move = blocks[block].price, block, state.block(block)
            if move.price > price:  # other layers have moved since; it may no longer be the cheapest
                blocks[block] = move
                continue
            del blocks[block]
        if not move.components:
            break
        if single and at_once > 1:
            state.make_all(state.singles(at_once, state.cost() - budget))
        else:
            state.make(name, move)
        moves += 1
    return Removal({name: layer.there.nonzero().flatten() for name, layer in layers.items()}, state.predicted)


class _State:
    """The layers, and ``J d`` of all that was removed so far."""

    def __init__(self, layers: Mapping[str, Gated], interaction: float) -> None:
        self.layers, self.interaction = layers, interaction
        self.count = len(next(iter(layers.values())).J_NR)
        self.Jd_N = torch.zeros(self.count, dtype=torch.float64)
        self.predicted = 0.0

    def cost(self) -> float:
        return sum(layer.cost for layer in self.layers.values())

    def changes(self, layer: Gated) -> Tensor:
        """Predicted change by removing each component next; infinite for those already gone. Shape (R,)."""
        change = layer.alone_R
        if self.interaction:
            change = change - self.interaction * (layer.J_NR.T @ self.Jd_N / self.count)
        return torch.where(layer.there, change, math.inf)

    def best_single(self) -> tuple[str, Move]:
        """The cheapest component of all factored layers."""
        best_name, best = "", NOTHING
        for name, layer in self.layers.items():
            k = layer.rank
            if not layer.factored or k <= 1:
                continue
            change = self.changes(layer)
            i = int(change.argmin())
            price = float(change[i] / (layer.costs[k] - layer.costs[k - 1]))
            if price < best.price:
                best_name, best = name, Move([i], float(change[i]), price)
        return best_name, best

    def singles(self, count: int, excess: float) -> list[tuple[str, Move]]:
        """The ``count`` cheapest components of all factored layers, or as few as save ``excess``; by price."""
        found = []
        for name, layer in self.layers.items():
            if layer.factored and layer.rank > 1:
                k = layer.rank
                change, index = self.changes(layer).topk(min(count, k - 1), largest=False)
                saved = (layer.costs[k - len(index) + 1 : k + 1] - layer.costs[k - len(index) : k]).flip(0)
                prices = zip(change.tolist(), (change / saved).tolist(), saved.tolist(), index.tolist(), strict=True)
                found += [(price, name, each, own, i) for each, price, own, i in prices]
        chosen = []
        for price, name, each, saved, i in sorted(found)[:count]:
            if excess <= 0:
                break
            chosen.append((name, Move([i], each, price)))
            excess -= saved
        return chosen

    def blocks(self) -> dict[str, Move]:
        """Of every dense layer that can become cheaper."""
        found = {name: self.block(name) for name, layer in self.layers.items() if not layer.factored}
        return {name: move for name, move in found.items() if move.components}

    def block(self, name: str) -> Move:
        """The removal of the lowest price that makes a dense layer cheaper."""
        layer = self.layers[name]
        change, total, best = self.changes(layer), 0.0, NOTHING
        F_RR = layer.J_NR.T @ layer.J_NR / self.count if self.interaction else None
        order: list[int] = []
        for k in range(layer.rank - 1, 0, -1):
            i = int(change.argmin())
            total += float(change[i])
            order.append(i)
            if F_RR is not None:
                change += self.interaction * F_RR[:, i]  # d_i = -1 turns -F d up by F_i
            change[i] = math.inf
            saved = layer.dense - float(layer.costs[k])
            if saved > 0 and total / saved < best.price:
                best = Move(list(order), total, total / saved)
        return best

    def make(self, name: str, move: Move) -> None:
        layer = self.layers[name]
        layer.there[move.components] = False
        self.Jd_N -= layer.J_NR[:, move.components].sum(1)
        self.predicted += move.change

    def make_all(self, moves: Sequence[tuple[str, Move]]) -> None:
        """Several of which each was looked at as if it were the only one: what two of them do together comes on top."""
        before, alone = self.Jd_N.clone(), 0.0
        for name, move in moves:
            alone += float(self.layers[name].J_NR[:, move.components].sum(1).square().sum())
            self.make(name, move)
        together = float((self.Jd_N - before).square().sum()) - alone
        self.predicted += self.interaction * together / (2 * self.count)
