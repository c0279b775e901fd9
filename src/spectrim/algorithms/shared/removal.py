"""Greedy removal of components over all layers together, by predicted change of the loss per saved cost.

The prediction for a set of removed components d (entries 0 or -1) is ``c^T d + d^T F d / 2`` with the slope c and the
Fisher information ``F = J^T J / N``, which is never formed over layers: what it does to d is ``J^T (J d) / N``. Without
what components do to one another, that is of F the diagonal alone, each has a price of its own.
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

    ``alone_R``: the predicted change by removing each alone. ``costs``: what the layer costs with k components, k =
    0..R, rising; ``dense``: what it costs dense, which is what it is left as while its factors cost no less. ``J_NR``:
    per-sample gate gradients, by which the removed change what the others do; None: they do not, in any layer.
    """

    alone_R: Tensor
    costs: Tensor
    dense: float
    J_NR: Tensor | None = None
    there: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.there = torch.ones(len(self.alone_R), dtype=torch.bool)

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


def remove(layers: Mapping[str, Gated], budget: float, refresh: int = 50, at_once: int = 0) -> Removal:
    """Remove components, the cheapest first, until the layers together cost no more than ``budget``.

    A factored layer gives up one component at a time. A dense layer gets nothing cheaper until enough of its components
    are gone: its move is the block of them with the lowest price, so that staying dense is weighed like anything else.
    Every layer keeps at least one component. A block may save more than was left to save: what was removed before and
    fits again is put back, the dearest first. ``refresh``: moves between two looks at the blocks of all dense layers;
    the one that is about to be made is always looked at anew. ``at_once``: components of factored layers, the cheapest,
    that go between two looks at what the others cost; 0: one in each ``GATES_A_LOOK`` gates, at least one.
    """
    state, moves = _State(layers), 0
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
    state.put_back(budget)
    return Removal({name: layer.there.nonzero().flatten() for name, layer in layers.items()}, state.predicted)


class _State:
    """The layers, and ``J d`` of all that was removed so far."""

    def __init__(self, layers: Mapping[str, Gated]) -> None:
        self.layers, self.predicted = layers, 0.0
        J_NR = next(iter(layers.values())).J_NR
        self.Jd_N = torch.zeros(0 if J_NR is None else len(J_NR), dtype=torch.float64)

    def cost(self) -> float:
        return sum(layer.cost for layer in self.layers.values())

    def changes(self, layer: Gated) -> Tensor:
        """Predicted change by removing each component next; infinite for those already gone. Shape (R,)."""
        change = layer.alone_R
        if layer.J_NR is not None:
            change = change - layer.J_NR.T @ self.Jd_N / len(self.Jd_N)
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
        F_RR = None if layer.J_NR is None else layer.J_NR.T @ layer.J_NR / len(layer.J_NR)
        order: list[int] = []
        for k in range(layer.rank - 1, 0, -1):
            i = int(change.argmin())
            total += float(change[i])
            order.append(i)
            if F_RR is not None:
                change += F_RR[:, i]  # d_i = -1 turns -F d up by F_i
            change[i] = math.inf
            saved = layer.dense - float(layer.costs[k])
            if saved > 0 and total / saved < best.price:
                best = Move(list(order), total, total / saved)
        return best

    def put_back(self, budget: float) -> None:
        """Give factored layers back what lowers the predicted change most per cost, as long as it fits."""
        while True:
            name, move = self.best_return(budget - self.cost())
            if move.price >= 0:
                return
            self.make(name, move, back=True)

    def best_return(self, room: float) -> tuple[str, Move]:
        """The removed component of a factored layer whose return, of at most ``room``, has the lowest price."""
        best_name, best = "", NOTHING
        for name, layer in self.layers.items():
            k = layer.rank
            if not layer.factored or k == len(layer.costs) - 1 or not layer.costs[k + 1] < layer.dense:
                continue
            cost = layer.costs[k + 1] - layer.costs[k]
            change = self.returns(layer)
            i = int(change.argmin())
            price = float(change[i] / cost)
            if cost <= room and price < best.price:
                best_name, best = name, Move([i], float(change[i]), price)
        return best_name, best

    def returns(self, layer: Gated) -> Tensor:
        """Predicted change by the return of each removed component; infinite for those still there. Shape (R,)."""
        change = -layer.alone_R
        if layer.J_NR is not None:
            change = change + (layer.J_NR.T @ self.Jd_N + layer.J_NR.square().sum(0)) / len(self.Jd_N)
        return torch.where(layer.there, math.inf, change)

    def make(self, name: str, move: Move, back: bool = False) -> None:
        self.layers[name].there[move.components] = back
        effect = self.effect(name, move)
        self.Jd_N += effect if back else -effect
        self.predicted += move.change

    def effect(self, name: str, move: Move) -> Tensor:
        """``-J d`` of what is to be removed; of no samples where components do nothing to one another."""
        J_NR = self.layers[name].J_NR
        return self.Jd_N if J_NR is None else J_NR[:, move.components].sum(1)

    def make_all(self, moves: Sequence[tuple[str, Move]]) -> None:
        """Several of which each was looked at as if it were the only one: what two of them do together comes on top."""
        before, alone = self.Jd_N.clone(), 0.0
        for name, move in moves:
            alone += float(self.effect(name, move).square().sum())
            self.make(name, move)
        together = float((self.Jd_N - before).square().sum()) - alone
        self.predicted += together / (2 * max(1, len(self.Jd_N)))
