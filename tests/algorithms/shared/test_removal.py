"""Removal: predictions add up, the budget is met, and staying dense is weighed like anything else."""

import itertools

import pytest
import torch
from torch import Tensor

from spectrim.algorithms.shared.removal import Gated, keep_dearest, remove
from spectrim.errors import UserError


def gated(J: Tensor, slope: Tensor | float = 0.0, unit: float = 3.0, dense: float | None = None) -> Gated:
    """A layer whose components cost ``unit`` each and do to one another what J says."""
    rank, J = J.shape[1], J.double()
    alone = J.square().mean(0) / 2 - slope
    return Gated(alone, unit * torch.arange(rank + 1), unit * rank if dense is None else dense, J)


def change(layers: dict[str, Gated], kept: dict[str, Tensor]) -> float:
    """c^T d + |J d|^2 / 2N of the components that are gone, from the definition."""
    J = torch.cat([layer.J_NR for layer in layers.values()], 1)
    slope = J.square().mean(0) / 2 - torch.cat([layer.alone_R for layer in layers.values()])
    parts = []
    for name, layer in layers.items():
        d = -torch.ones(layer.J_NR.shape[1], dtype=torch.float64)
        d[kept[name]] = 0
        parts.append(d)
    d = torch.cat(parts)
    return float(slope @ d + (J @ d).square().sum() / (2 * len(J)))


def test_predicted_change_is_that_of_the_quadratic_for_all_layers_together() -> None:
    layers = {
        n: gated(torch.randn(20, r), 0.1 * torch.randn(r), dense=dense) for n, r, dense in (("a", 9, 20), ("b", 6, 99))
    }
    removal = remove(layers, budget=12)
    assert removal.predicted == pytest.approx(change(layers, removal.kept))


def test_one_removal_at_a_time_is_the_best_of_all() -> None:
    for _ in range(20):
        layers = {name: gated(torch.randn(8, 4), torch.randn(4), dense=12.0 + 1e-9) for name in "ab"}
        everything = {name: torch.arange(4) for name in layers}
        candidates = []
        for name, i in itertools.product(layers, range(4)):
            candidates.append(change(layers, everything | {name: torch.tensor([k for k in range(4) if k != i])}))
        assert remove(layers, budget=21).predicted == pytest.approx(min(candidates))


def test_components_that_undo_each_other_go_together() -> None:
    """Two components of different layers whose effects cancel cost nothing as a pair, however much each costs alone."""
    effect = torch.randn(30, 1)
    a = gated(torch.cat([effect, 0.9 * torch.randn(30, 1)], 1), dense=7.0)
    b = gated(torch.cat([-effect, 0.9 * torch.randn(30, 1)], 1), dense=7.0)
    a.alone_R *= 0  # decide by the interaction alone
    b.alone_R *= 0
    removal = remove({"a": a, "b": b}, budget=6)
    assert [kept.tolist() for kept in removal.kept.values()] == [[1], [1]]


def test_a_dense_layer_is_left_alone_until_its_block_is_the_cheapest() -> None:
    """Factoring the dense layer at all removes three components that matter; the factored one has room to give."""
    dense = gated(torch.randn(50, 6), dense=9.5)  # pays from three components down
    factored = gated(0.01 * torch.randn(50, 6), dense=100.0)
    removal = remove({"dense": dense, "factored": factored}, budget=9.5 + 6)
    assert len(removal.kept["dense"]) == 6
    assert len(removal.kept["factored"]) == 2
    removal = remove({"dense": gated(0.001 * torch.randn(50, 6), dense=9.5), "factored": factored}, budget=9)
    assert len(removal.kept["dense"]) <= 3


@pytest.mark.parametrize("budget", [40.0, 25.0, 11.0, 6.0])
def test_the_budget_is_met_and_one_component_is_always_left(budget: float) -> None:
    layers = {n: gated(torch.randn(10, 8), torch.randn(8), dense=15.0) for n in "ab"}
    removal = remove(layers, budget)
    assert sum(min(3.0 * len(kept), 15.0) for kept in removal.kept.values()) <= budget
    assert min(len(kept) for kept in removal.kept.values()) >= 1
    assert min(len(kept) for kept in remove(layers, 0.0).kept.values()) == 1


def test_prices_count_what_is_saved() -> None:
    """Of two equally harmful components the one that saves more goes first."""
    J = torch.eye(4)[:, :2].repeat(5, 1)
    layers = {"small": gated(J, unit=1.0, dense=2.1), "large": gated(J, unit=10.0, dense=20.1)}
    removal = remove(layers, budget=21)
    assert len(removal.kept["large"]) == 1
    assert len(removal.kept["small"]) == 2


@pytest.mark.parametrize("budget", [60.0, 31.0, 6.0])
def test_several_at_once_are_predicted_as_exactly_and_meet_the_budget_as_closely(budget: float) -> None:
    layers = {n: gated(torch.randn(30, 12), 0.1 * torch.randn(12), dense=d) for n, d in (("a", 99.0), ("b", 30.0))}
    removal = remove(layers, budget, at_once=5)
    assert removal.predicted == pytest.approx(change(layers, removal.kept))
    left = sum(min(3.0 * len(kept), layers[name].dense) for name, kept in removal.kept.items())
    assert budget - 3 < left <= budget or left < budget == 31  # the block of b saves more than one component


def test_several_at_once_are_those_that_go_one_by_one_where_they_do_not_meet() -> None:
    """Components whose effects are orthogonal do not change one another's price."""
    J = torch.eye(20) * torch.rand(20).sqrt()
    one, several = (
        remove({"a": gated(J[:, :10], dense=99.0), "b": gated(J[:, 10:], dense=99.0)}, 24.0, at_once=count).kept
        for count in (1, 4)
    )
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_without_interaction_every_component_has_its_own_price_alone() -> None:
    """More components than samples: what they seem to do together is chance, and is not looked at."""
    J = torch.randn(3, 40) * torch.linspace(2, 0.1, 40)
    for at_once in (1, 7):
        layer = gated(J, dense=200.0)
        layer.J_NR = None
        removal = remove({"a": layer}, budget=30.0, at_once=at_once)
        alone = J.double().square().mean(0) / 2
        assert removal.kept["a"].tolist() == alone.topk(10).indices.sort().values.tolist()
        assert removal.predicted == pytest.approx(float(alone.sum() - alone.topk(10).values.sum()))


def test_what_a_block_saves_beyond_the_budget_is_put_back_dearest_first() -> None:
    """The block leaves room for two components: of all that are gone the dearest, and the next."""
    few = gated(torch.zeros(1, 6), -torch.tensor([1.0, 2.0, 4.0, 5.0, 50.0, 60.0]), dense=99.0)
    block = gated(torch.zeros(1, 6), -3.5, dense=15.5)
    few.J_NR = block.J_NR = None
    removal = remove({"few": few, "block": block}, budget=20.5)  # 1, 2, 4 and then the block, of 5, leave 12
    assert removal.kept["few"].tolist() == [2, 3, 4, 5]
    assert len(removal.kept["block"]) == 2
    assert removal.predicted == pytest.approx(1 + 2 + 4 * 3.5)


def test_after_putting_back_nothing_fits_that_would_lower_the_predicted_change() -> None:
    cut = 0
    for seed in range(30):
        torch.manual_seed(seed)
        layers = {n: gated(torch.randn(12, 8), 0.2 * torch.randn(8), dense=d) for n, d in (("a", 99.0), ("b", 16.0))}
        removal = remove(layers, budget=25)
        assert removal.predicted == pytest.approx(change(layers, removal.kept))
        room = 25 - sum(min(3.0 * len(kept), layers[name].dense) for name, kept in removal.kept.items())
        cut += len(removal.kept["b"]) < 5
        for name, kept in removal.kept.items():
            if room >= 3 and 3.0 * len(kept) + 3 < layers[name].dense:
                gone = set(range(8)) - set(kept.tolist())
                returned = [removal.kept | {name: torch.tensor([*kept.tolist(), i])} for i in gone]
                assert all(change(layers, other) >= removal.predicted - 1e-9 for other in returned)
    assert cut > 0


def priced(alone: list[float], costs: list[float], dense: float) -> Gated:
    """A layer whose components do not act on each other."""
    return Gated(torch.tensor(alone, dtype=torch.float64), torch.tensor([0, *costs]), dense)


def test_the_knapsack_keeps_the_components_that_matter_wherever_they_are() -> None:
    layer = priced([0.1, 5.0, 0.2, 4.0, 3.0], [1, 2, 3, 4, 5], 9.0)
    removal = keep_dearest({"a": layer}, 3.0)
    assert removal.kept["a"].tolist() == [1, 3, 4]
    assert removal.predicted == pytest.approx(0.3)
    assert layer.there.all()


def test_of_components_that_matter_alike_the_first_are_kept() -> None:
    assert keep_dearest({"a": priced([1.0] * 4, [1, 2, 3, 4], 9.0)}, 2.0).kept["a"].tolist() == [0, 1]


def test_the_knapsack_leaves_a_layer_dense_rather_than_at_a_rank_that_costs_more() -> None:
    layers = {"a": priced([4.0, 3.0, 2.0, 1.0], [3, 6, 9, 12], 8.0), "b": priced([1.0, 0.5], [3, 6], 8.0)}
    for budget, ranks in ((14.0, [4, 2]), (13.9, [4, 1]), (10.9, [2, 1]), (8.9, [1, 1])):
        removal = keep_dearest(layers, budget)
        assert [len(kept) for kept in removal.kept.values()] == ranks


def test_the_knapsack_weighs_a_cost_that_is_concave_in_the_rank() -> None:
    """With equal components, pivoted factors save more by one layer that is cut deep than by two cut halfway."""
    costs = [float(k * (16 - k)) for k in range(1, 9)]
    layers = {name: priced([1.0] * 8, costs, 64.0) for name in "ab"}
    removal = keep_dearest(layers, 80.0)
    assert sorted(len(kept) for kept in removal.kept.values()) == [1, 8]
    assert removal.predicted == pytest.approx(7)


@pytest.mark.parametrize("budget", [0.0, -5.0, 6.0])
def test_the_knapsack_leaves_one_component_in_every_layer(budget: float) -> None:
    layers = {name: priced([-1.0, 2.0, 1.0], [3, 6, 9], 7.0) for name in "ab"}
    assert [kept.tolist() for kept in keep_dearest(layers, budget).kept.values()] == [[1], [1]]


def test_the_knapsack_removes_what_harms_and_no_more() -> None:
    layers = {"a": priced([-1.0, 2.0, -3.0, 1.0], [1, 2, 3, 4], 9.0)}
    removal = keep_dearest(layers, 100.0)
    assert removal.kept["a"].tolist() == [1, 3] and removal.predicted == pytest.approx(-4)


def test_the_knapsack_predicts_no_more_than_the_greedy_removal_and_meets_the_same_budget() -> None:
    better = 0
    for seed in range(30):
        torch.manual_seed(seed)
        layers = {
            name: priced((torch.rand(12) ** 3).tolist(), [float(k * (24 - k)) for k in range(1, 13)], dense)
            for name, dense in (("a", 144.0), ("b", 120.0), ("c", 100.0))
        }
        for budget in (330.0, 250.0, 150.0):
            one, other = keep_dearest(layers, budget), remove(layers, budget)
            for removal in (one, other):
                costs = [
                    min(float(layers[name].costs[len(own)]), layers[name].dense) for name, own in removal.kept.items()
                ]
                assert sum(costs) <= budget
            assert one.predicted <= other.predicted + 1e-9
            better += one.predicted < other.predicted - 1e-9
    assert better > 9  # of 90


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_change_that_is_no_number_is_refused_by_the_name_of_its_layer(bad: float) -> None:
    with pytest.raises(UserError, match="^b: a predicted change is not finite"):
        keep_dearest({"a": priced([1.0], [1], 3.0), "b": priced([1.0, bad], [1, 2], 3.0)}, 2.0)
