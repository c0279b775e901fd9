"""Removal of components over all layers together, by predicted change of the loss per saved cost.

Let d have the entry -1 for a removed component and 0 for any other. The predicted change of the loss is
``c^T d + d^T F d / 2``, with the slope c and the Fisher information ``F = J^T J / N``. F is never formed over all
layers, because ``F d = J^T (J d) / N``. If components do not act on each other, only the diagonal of F counts, and each
component changes the loss by itself. The best choice is then a knapsack over the layers (``keep_dearest``). Otherwise a
greedy search removes one component or block of components after another (``remove``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.algorithms.shared import knapsack
from spectrim.errors import UserError
from spectrim.factored.linalg import tail_sums

# Gates for each component that is removed at once. Small networks lose one at a time, language models a dozen.
GATES_A_LOOK = 8192
# Moves after which the blocks of all dense layers are computed anew. The one that is about to go always is.
REFRESH = 50


@dataclass
class Gated:
    """One layer with its R components. ``there`` tells which of them the greedy removal has left.

    ``alone_R``: the predicted change of the loss if one component alone is removed.
    ``costs``: the cost with k components, k = 0..R, rising.
    ``dense``: the cost of the dense layer. The layer stays dense while its factors cost no less.
    ``J_NR``: the gate gradients of each sample, through which components act on each other. None, in all layers, means
        that they do not.
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
    """Components to remove from one layer, in order, the predicted change, and the price: change per saved cost."""

    components: list[int]
    change: float
    price: float


NOTHING = Move([], 0.0, math.inf)


class Removal(NamedTuple):
    """The indices of the components kept of each layer, and the predicted change of the loss."""

    kept: dict[str, Tensor]
    predicted: float


def keep_dearest(layers: Mapping[str, Gated], budget: float) -> Removal:
    """Remove the components whose predicted change is least in sum, so that the layers cost no more than ``budget``.

    Components must not act on each other. Of the R components of a layer, those with the highest predicted change are
    kept, wherever they are in the spectrum. Keeping k of them changes the loss by the sum of the other R - k, at
    ``costs[k]``. These are the options of ``knapsack.choose``, for each k at which the layer is factored and for all R.
    Every layer keeps at least one component. A budget out of reach is met as nearly as that allows.

    Raises ``UserError`` for a predicted change that is not finite.
    """
    dearest, ranks, options = {}, {}, {}
    for name, layer in layers.items():
        if not layer.alone_R.isfinite().all():
            raise UserError(f"{name}: a predicted change is not finite; look for NaN in weights and inputs")
        count = len(layer.alone_R)
        dearest[name] = layer.alone_R.argsort(descending=True, stable=True)
        ranks[name] = [k for k, cost in enumerate(layer.costs.tolist()) if 0 < k < count and cost < layer.dense]
        ranks[name].append(count)
        changes, costs = tail_sums(layer.alone_R[dearest[name]]), layer.costs.clamp(max=layer.dense)
        own = (curve[ranks[name]].double().cpu().numpy() for curve in (costs, changes))
        options[name] = knapsack.Options(*own)
    chosen = knapsack.choose(options, max(budget, knapsack.least_cost(options)))
    kept = {name: dearest[name][: ranks[name][chosen[name]]].sort().values for name in layers}
    return Removal(kept, sum(float(options[name].changes[i]) for name, i in chosen.items()))


def remove(layers: Mapping[str, Gated], budget: float, at_once: int = 0) -> Removal:
    """Remove components, the lowest price first, until the layers together cost no more than ``budget``.

    A factored layer loses one component at a time. A dense layer gets cheaper only once enough of its components are
    gone, so its move is the block of components with the lowest price. Staying dense is thus weighed like any other
    choice. Every layer keeps at least one component. A block may save more than was needed. Components that fit into
    the budget again are then put back, the highest price first.

    ``at_once``: number of components of factored layers that are removed before prices are computed anew. 0 means one
        for each ``GATES_A_LOOK`` gates, and at least one.
    """
    state, moves = _State(layers), 0
    at_once = at_once or max(1, sum(layer.rank for layer in state.layers.values()) // GATES_A_LOOK)
    blocks: dict[str, Move] = {}
    while state.cost() > budget:
        if moves % REFRESH == 0:
            blocks = state.blocks()
        name, move = state.best_single()
        block = min(blocks, key=lambda dense: blocks[dense].price, default="")
        single = not block or blocks[block].price >= move.price
        if not single:
            price, name, move = blocks[block].price, block, state.block(block)
            if move.price > price:  # other layers have lost components since, so another move may be cheaper
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
    return Removal({name: layer.there.nonzero().flatten() for name, layer in state.layers.items()}, state.predicted)


class _State:
    """The layers, the predicted change, and ``J d`` of all components removed so far."""

    def __init__(self, layers: Mapping[str, Gated]) -> None:
        self.layers, self.predicted = {name: replace(layer) for name, layer in layers.items()}, 0.0
        J_NR = next(iter(layers.values())).J_NR
        self.Jd_N = torch.zeros(0 if J_NR is None else len(J_NR), dtype=torch.float64)

    def cost(self) -> float:
        return sum(layer.cost for layer in self.layers.values())

    def changes(self, layer: Gated) -> Tensor:
        """Return the predicted change if each component is removed next; infinite for removed ones. Shape (R,)."""
        change = layer.alone_R
        if layer.J_NR is not None:
            change = change - layer.J_NR.T @ self.Jd_N / len(self.Jd_N)
        return torch.where(layer.there, change, math.inf)

    def best_single(self) -> tuple[str, Move]:
        """Return the component with the lowest price of all factored layers."""
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
        """Return the ``count`` components of the lowest prices in all factored layers, or as few as save ``excess``."""
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
        """Return the block of every dense layer that can get cheaper."""
        found = {name: self.block(name) for name, layer in self.layers.items() if not layer.factored}
        return {name: move for name, move in found.items() if move.components}

    def block(self, name: str) -> Move:
        """Return the removal with the lowest price that makes a dense layer cheaper."""
        layer = self.layers[name]
        change, total, best = self.changes(layer), 0.0, NOTHING
        F_RR = None if layer.J_NR is None else layer.J_NR.T @ layer.J_NR / len(layer.J_NR)
        order: list[int] = []
        for k in range(layer.rank - 1, 0, -1):
            i = int(change.argmin())
            total += float(change[i])
            order.append(i)
            if F_RR is not None:
                change += F_RR[:, i]  # d_i = -1 raises -F d by F_i
            change[i] = math.inf
            saved = layer.dense - float(layer.costs[k])
            if saved > 0 and total / saved < best.price:
                best = Move(list(order), total, total / saved)
        return best

    def put_back(self, budget: float) -> None:
        """Put back the components that lower the predicted change most per cost, as long as they fit."""
        while True:
            name, move = self.best_return(budget - self.cost())
            if move.price >= 0:
                return
            self.make(name, move, back=True)

    def best_return(self, room: float) -> tuple[str, Move]:
        """Return the removed component of a factored layer that costs at most ``room`` and has the lowest price."""
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
        """Return the predicted change if each removed component is put back; infinite for others. Shape (R,)."""
        change = -layer.alone_R
        if layer.J_NR is not None:
            change = change + (layer.J_NR.T @ self.Jd_N + layer.J_NR.square().sum(0)) / len(self.Jd_N)
        return torch.where(layer.there, math.inf, change)

    def make(self, name: str, move: Move, back: bool = False) -> None:
        """Remove the components of ``move``, or put them ``back``."""
        self.layers[name].there[move.components] = back
        effect = self.effect(name, move)
        self.Jd_N += effect if back else -effect
        self.predicted += move.change

    def effect(self, name: str, move: Move) -> Tensor:
        """Return ``-J d`` of the components of ``move``; empty if components do not act on each other. Shape (N,)."""
        J_NR = self.layers[name].J_NR
        return self.Jd_N if J_NR is None else J_NR[:, move.components].sum(1)

    def make_all(self, moves: Sequence[tuple[str, Move]]) -> None:
        """Make several moves that were each predicted alone, and add what they do together to the prediction."""
        before, alone = self.Jd_N.clone(), 0.0
        for name, move in moves:
            alone += float(self.effect(name, move).square().sum())
            self.make(name, move)
        together = float((self.Jd_N - before).square().sum()) - alone
        self.predicted += together / (2 * max(1, len(self.Jd_N)))
