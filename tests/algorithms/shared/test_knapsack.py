"""The knapsack over layers is held against all combinations: it misses the best by one item at most."""

import itertools
import math
import time

import numpy as np
import pytest

from spectrim.algorithms.shared.knapsack import Options, choose, least_cost, lower_hull
from spectrim.errors import UserError

Layers = dict[str, Options]


def options(costs: list[float], changes: list[float]) -> Options:
    return Options(np.array(costs, dtype=float), np.array(changes, dtype=float))


def change(layers: Layers, chosen: dict[str, int]) -> float:
    return sum(float(layers[name].changes[i]) for name, i in chosen.items())


def cost(layers: Layers, chosen: dict[str, int]) -> float:
    return sum(float(layers[name].costs[i]) for name, i in chosen.items())


def every(layers: Layers) -> list[dict[str, int]]:
    """All combinations of one option a layer."""
    return [
        dict(zip(layers, combined, strict=True))
        for combined in itertools.product(*(range(len(own.costs)) for own in layers.values()))
    ]


def instance(seed: int) -> Layers:
    """Up to four layers of any shape: whole costs, changes that may be negative, equal ones among them."""
    random = np.random.default_rng(seed)
    return {
        f"layer{i}": Options(random.integers(1, 30, size).astype(float), np.round(random.normal(0.5, 1, size), 1))
        for i, size in enumerate(random.integers(1, 7, random.integers(1, 5)))
    }


def ranks(values: list[float], form: str = "plain", rows: int = 8, columns: int = 8) -> Options:
    """The ranks of a layer with components of these predicted changes, and staying dense."""
    values, dense = sorted(values, reverse=True), float(rows * columns)
    costs = [k * (rows + columns - k * (form == "pivoted")) for k in range(1, len(values) + 1)]
    found = [(float(c), sum(values[k:])) for k, c in enumerate(costs, 1) if c < dense]
    return options(*map(list, zip(*found, (dense, 0.0), strict=True)))


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_is_better_by_more_than_one_item(seed: int) -> None:
    layers = instance(seed)
    combined = every(layers)
    largest = max(
        (float(-np.diff(own.changes[lower_hull(own)]).min()) for own in layers.values() if len(lower_hull(own)) > 1),
        default=0.0,
    )
    for budget in np.linspace(least_cost(layers), sum(own.costs.max() for own in layers.values()), 9):
        best = min(change(layers, one) for one in combined if cost(layers, one) <= budget)
        chosen = choose(layers, float(budget))
        assert cost(layers, chosen) <= budget
        assert best - 1e-9 <= change(layers, chosen) <= best + largest + 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_is_better_where_a_multiplier_gives_the_budget(seed: int) -> None:
    """At any price of a unit of cost each layer takes its own minimum. The cost of these is a corner of the hull."""
    layers = instance(seed)
    combined = every(layers)
    for multiplier in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        alone = {name: int((own.changes + multiplier * own.costs).argmin()) for name, own in layers.items()}
        budget = cost(layers, alone)
        best = min(change(layers, one) for one in combined if cost(layers, one) <= budget)
        assert change(layers, choose(layers, budget)) == pytest.approx(best)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_ranks_of_layers_are_chosen_as_well_as_by_trying_all(form: str) -> None:
    """Plain factors have a gap below the dense layer. Pivoted ones cost k (rows + columns - k), a concave curve."""
    off = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        layers = {name: ranks(list(random.exponential(size=8) ** 3), form) for name in "abc"}
        combined = every(layers)
        for budget in range(60, 192, 11):
            best = min(change(layers, one) for one in combined if cost(layers, one) <= budget)
            found = change(layers, choose(layers, budget))
            dearest = max(float(-np.diff(own.changes[lower_hull(own)]).min()) for own in layers.values())
            assert found <= best + dearest
            off += found > best + 1e-9
    assert off < 12  # of 240: what a large item leaves of the budget is spent well


@pytest.mark.parametrize("seed", range(20))
def test_a_larger_budget_does_no_harm_at_the_corners(seed: int) -> None:
    """Between corners a larger budget may buy a large item in place of two small ones that were better together."""
    layers = instance(seed)
    budgets = sorted(
        cost(layers, {name: int((own.changes + m * own.costs).argmin()) for name, own in layers.items()})
        for m in np.geomspace(0.001, 10, 20)
    )
    found = [change(layers, choose(layers, budget)) for budget in budgets]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found))


def test_the_order_of_layers_does_not_matter_and_ties_go_by_name() -> None:
    layers = {name: options([1, 3], [1, 0]) for name in "dbca"}
    for permuted in itertools.permutations(layers.items()):
        assert choose(dict(permuted), 8.0) == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_equal_options_are_told_apart_by_their_place() -> None:
    layers = {"a": options([2, 2, 5, 5], [1, 1, 0, 0])}
    assert [choose(layers, budget)["a"] for budget in (2.0, 4.9, 5.0, 99.0)] == [0, 0, 2, 2]


def test_options_come_in_any_order() -> None:
    own = options([1, 2, 3, 4, 5], [9, 5, 3, 2, 1.5])
    mixed = [3, 0, 4, 2, 1]
    shuffled = Options(own.costs[mixed], own.changes[mixed])
    for budget in range(1, 7):
        assert mixed[choose({"a": shuffled}, budget)["a"]] == choose({"a": own}, budget)["a"]


def test_one_layer_takes_the_best_option_that_fits() -> None:
    own = options([1, 2, 3, 4, 10], [9, 8.5, 8, 2, 0])  # 2 and 3 lie above the hull
    assert [choose({"a": own}, budget)["a"] for budget in (1, 2, 3.9, 4, 9, 10)] == [0, 1, 2, 3, 3, 4]


def test_what_lowers_the_loss_is_removed_whatever_the_budget() -> None:
    layers = {"a": options([1, 2, 4], [-1.0, -2.0, 0.0]), "b": options([1, 4], [0.5, 0.0])}
    assert choose(layers, 100.0) == {"a": 1, "b": 1}
    assert choose(layers, 3.0) == {"a": 1, "b": 0}


def test_the_hull_leaves_out_what_no_multiplier_takes() -> None:
    assert lower_hull(options([1, 2, 3, 4, 5], [10, 8, 3, 3, 0])) == [0, 2, 4]
    assert lower_hull(options([1, 2, 3], [2, 1, 0])) == [0, 2]  # on one line
    assert lower_hull(options([1, 1, 2], [5, 4, 6])) == [1]
    assert lower_hull(options([7], [1])) == [0]


def test_a_budget_out_of_reach_is_refused_with_the_least_that_is_not() -> None:
    layers = {"a": options([3, 9], [1, 0]), "b": options([4, 9], [1, 0])}
    assert choose(layers, 7.0) == {"a": 0, "b": 0}
    with pytest.raises(UserError, match=r"^a budget of 6.5 is out of reach: the cheapest options cost 7$"):
        choose(layers, 6.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["costs", "changes"])
def test_what_is_not_finite_is_refused_by_the_name_of_the_layer(bad: float, where: str) -> None:
    own = options([1, 2], [1, 0])
    getattr(own, where)[1] = bad
    with pytest.raises(UserError, match="^fc: a predicted change or a cost is not finite") as refusal:
        choose({"conv": options([1], [0]), "fc": own}, 10.0)
    assert "\n" not in str(refusal.value)


def test_two_hundred_layers_of_four_thousand_ranks_take_no_time() -> None:
    random, layers = np.random.default_rng(0), {}
    for i in range(200):
        values, k = np.sort(random.exponential(size=4096) ** 6), np.arange(1.0, 4097)
        changes = np.append(np.cumsum(values)[-2::-1], 0.0)
        layers[str(i)] = Options(k * (8192 - k) if i % 2 else np.minimum(k * 8192, 4096.0**2), changes)
    budget = 200 * 4096**2 * 0.5
    start = time.process_time()
    chosen = choose(layers, budget)
    assert time.process_time() - start < 3  # half a second on a machine that does nothing else
    assert budget - 8192 < cost(layers, chosen) <= budget
