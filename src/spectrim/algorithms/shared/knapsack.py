"""Choose one option for each layer so that the loss changes least within a budget: the multiple-choice knapsack.

A layer has options: each of its ranks, and staying dense. Option i costs ``c_i`` and changes the loss by ``D_i``:

    minimise  sum_l D_l(i_l)   subject to   sum_l c_l(i_l) <= B

A multiplier m on the cost makes the layers independent: each takes ``min_i D_i + m c_i``. For every m this is a corner
of the lower convex hull of the layer's points (c_i, D_i). An edge between two corners has a price: the change of the
loss per cost. The edges of all layers, taken in the order of their prices, pass through the solutions for all m. One
sort therefore answers every budget (Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27,
1979).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spectrim.errors import UserError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.intp]

CLOSE = 1e-3  # of the bound: a solution as near to it is not improved any more
LAYERS = 64  # number of layers of which an option is set by hand in search of a better solution
TRIES = 16  # number of these that are completed


class Options(NamedTuple):
    """What a layer may become: option i costs ``costs[i]`` and changes the loss by ``changes[i]``. In any order."""

    costs: Floats
    changes: Floats


def choose(layers: Mapping[str, Options], budget: float) -> dict[str, int]:
    """Return the option of each layer such that the summed change is least and the summed cost within ``budget``.

    The cheapest edges are taken until one does not fit. What is left of the budget is spent on later edges, then on
    options between the corners. The summed change exceeds the least one by no more than the change along the first edge
    that did not fit. Where the budget ends at a corner, it is the least one. Large items, such as a dense layer that
    must be factored at all, may leave much room. Single layers are then set to another option and the rest is solved
    again. Ties go by the names of the layers, so their order does not matter.

    Raises ``UserError`` where no options fit into ``budget``, or where a cost or a change is not finite.
    """
    names = sorted(layers)
    for name in names:
        if not (np.isfinite(layers[name].costs).all() and np.isfinite(layers[name].changes).all()):
            raise UserError(f"{name}: a predicted change or a cost is not finite; look for NaN in weights and inputs")
    if least_cost(layers) > budget:
        least = f"the cheapest options cost {least_cost(layers):.6g}"
        raise UserError(f"a budget of {budget:.6g} is out of reach: {least}")
    problem = _Problem([layers[name] for name in names])
    chosen = problem.solve(budget)
    if not problem.is_close(chosen, budget):
        others = [problem.solve(budget, layer, option) for layer, option in problem.alternatives(chosen, budget)]
        chosen = min([chosen, *others], key=problem.change)
    return dict(zip(names, chosen.tolist(), strict=True))


def least_cost(layers: Mapping[str, Options]) -> float:
    """Return the cost of the cheapest options of all layers."""
    return sum(float(layers[name].costs.min()) for name in sorted(layers))


def lower_hull(options: Options) -> list[int]:
    """Return the options on the lower convex hull, from the cheapest to the one with the least change.

    Along them costs rise and changes fall, each edge at a smaller gain per cost than the one before. Of options on one
    straight line only the ends are returned, and of equal ones the first.
    """
    order = np.lexsort((options.changes, options.costs))
    falling = np.minimum.accumulate(options.changes[order])
    order = order[np.concatenate([[True], falling[1:] < falling[:-1]])]  # those that change less than any cheaper one
    costs, changes = options.costs[order].tolist(), options.changes[order].tolist()
    hull, prices = [0], [-np.inf]
    for i in range(1, len(order)):
        while (price := (changes[i] - changes[hull[-1]]) / (costs[i] - costs[hull[-1]])) <= prices[-1]:
            hull.pop()
            prices.pop()
        hull.append(i)
        prices.append(price)
    return [int(i) for i in order[hull]]


class _Problem:
    """The layers with the edges of their hulls, the lowest price first; those of one layer in the order of its hull.

    ``layer_E``, ``cost_E``, ``change_E``: the layer of each of the E edges, what it costs, and how it changes the loss.
    """

    def __init__(self, layers: Sequence[Options]) -> None:
        self.layers = layers
        self.hulls = [np.array(lower_hull(own)) for own in layers]
        costs = [np.diff(own.costs[hull]) for own, hull in zip(layers, self.hulls, strict=True)]
        changes = [np.diff(own.changes[hull]) for own, hull in zip(layers, self.hulls, strict=True)]
        layer_E = np.repeat(np.arange(len(layers)), [len(own) for own in costs])
        cost_E, change_E = np.concatenate(costs), np.concatenate(changes)
        order = np.argsort(change_E / cost_E, kind="stable")
        self.layer_E, self.cost_E, self.change_E = layer_E[order], cost_E[order], change_E[order]
        self.cheapest = np.array([hull[0] for hull in self.hulls])

    def cost(self, chosen: Integers) -> float:
        return float(sum(own.costs[i] for own, i in zip(self.layers, chosen, strict=True)))

    def change(self, chosen: Integers) -> float:
        return float(sum(own.changes[i] for own, i in zip(self.layers, chosen, strict=True)))

    def solve(self, budget: float, layer: int = -1, option: int = 0) -> Integers:
        """Return a good option of each layer. One ``layer`` may be given: it gets ``option``, or a dearer one."""
        chosen, free = self.cheapest.copy(), self.layer_E != layer
        if layer >= 0:
            chosen[layer] = option
        taken = _taken(self.layer_E[free], self.cost_E[free], len(self.layers), budget - self.cost(chosen))
        for i, hull in enumerate(self.hulls):
            if i != layer:
                chosen[i] = hull[taken[i]]
        return self._filled(chosen, budget)

    def _filled(self, chosen: Integers, budget: float) -> Integers:
        """Return ``chosen`` with dearer options that still fit into ``budget``, the largest gain per cost first."""
        room = budget - self.cost(chosen)
        while True:
            best = max(self._steps(chosen, room), default=None)
            if best is None:
                return chosen
            _, minus, option = best
            room -= float(self.layers[-minus].costs[option] - self.layers[-minus].costs[chosen[-minus]])
            chosen[-minus] = option

    def _steps(self, chosen: Integers, room: float) -> Iterator[tuple[float, int, int]]:
        """Yield, for each layer, the largest gain per cost of an option that fits, minus the layer, and the option."""
        for i, own in enumerate(self.layers):
            gain, need = own.changes[chosen[i]] - own.changes, own.costs - own.costs[chosen[i]]
            fits = np.flatnonzero((gain > 0) & (need > 0) & (need <= room))
            if len(fits):
                price = gain[fits] / need[fits]
                yield float(price.max()), -i, int(fits[price.argmax()])

    def is_close(self, chosen: Integers, budget: float) -> bool:
        """Return whether ``chosen`` is as good as the bound, in which a part of the last edge may be taken."""
        whole, room = _prefix(self.cost_E, budget - self.cost(self.cheapest))
        bound = self.change(self.cheapest) + float(self.change_E[:whole].sum())
        if whole < len(self.cost_E):
            bound += room * float(self.change_E[whole] / self.cost_E[whole])
        return self.change(chosen) - bound <= CLOSE * abs(bound)

    def alternatives(self, chosen: Integers, budget: float) -> list[tuple[int, int]]:
        """Return layers with another option each, those first with which the edges of the others lead furthest.

        The layers are those with an edge nearest in price to the last one that fits.
        """
        whole, _ = _prefix(self.cost_E, budget - self.cost(self.cheapest))
        near = np.abs(np.arange(len(self.layer_E)) - whole).argsort(kind="stable")
        found = []
        for layer in list(dict.fromkeys(self.layer_E[near].tolist()))[:LAYERS]:
            own, first, others = self.layers[layer], self.cheapest[layer], self.layer_E != layer
            spent, gained = (np.append(0, np.cumsum(part[others])) for part in (self.cost_E, self.change_E))
            room = budget - self.cost(self.cheapest) + own.costs[first] - own.costs
            count = spent.searchsorted(room, side="right") - 1
            change = np.where(room >= 0, own.changes - own.changes[first] + gained[count], np.inf)
            change[chosen[layer]] = np.inf
            option = int(change.argmin())
            if change[option] < np.inf:
                found.append((float(change[option]), layer, option))
        return [(layer, option) for _, layer, option in sorted(found)[:TRIES]]


def _prefix(cost_E: Floats, room: float) -> tuple[int, float]:
    """Return how many of the first edges cost no more than ``room`` together, and what they leave of it."""
    spent = np.cumsum(cost_E)
    whole = int(spent.searchsorted(room, side="right"))
    return whole, room - float(spent[whole - 1]) if whole else room


def _taken(layer_E: Integers, cost_E: Floats, layers: int, room: float) -> Integers:
    """Return the number of edges to take of each of the ``layers`` so that they cost no more than ``room``.

    An edge that does not fit bars those after it in its layer. Edges of other layers may still fit.
    """
    first, room = _prefix(cost_E, room)
    taken = np.bincount(layer_E[:first], minlength=layers)
    least = np.minimum.accumulate(cost_E[::-1])[::-1]
    barred: set[int] = set()
    for i in range(first, len(cost_E)):
        if least[i] > room or len(barred) == layers:
            break
        layer, cost = int(layer_E[i]), float(cost_E[i])
        if layer in barred:
            continue
        if cost <= room:
            taken[layer] += 1
            room -= cost
        else:
            barred.add(layer)
    return taken
