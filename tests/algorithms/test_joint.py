"""Joint meets what it is asked for, never sees what it must not, and beats one ratio for every layer."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectrim.algorithms import joint
from spectrim.algorithms.joint import TRIES, Joint
from spectrim.algorithms.shared import expansion, tolerance
from spectrim.algorithms.shared.slopes import significant
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


@pytest.fixture
def trained(net: nn.Sequential) -> tuple[nn.Sequential, Objective]:
    """``net`` after learning to tell five shifted clouds apart, and three disjoint sets of them."""

    def batches(count: int) -> list:
        found = []
        for _ in range(count):
            labels = torch.randint(5, (50,))
            found.append((torch.randn(50, 3, 8, 8) + centres[labels], labels))
        return found

    centres = 0.5 * torch.randn(5, 3, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for x, y in batches(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    splits = {"calibration": batches(8), "verification": batches(8), "unseen": batches(8)}
    return net.eval(), Objective(F.cross_entropy, splits)


@pytest.mark.parametrize("decomposer", [SVD("channel"), WhitenedSVD("channel"), WhitenedSVD("spatial")], ids=str)
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
def test_budget_of_parameters_is_met_from_below(trained: Any, decomposer: Any, share: float) -> None:
    net, objective = trained
    result = Joint(params_kept=share, samples=200).compress(net, decomposer, objective)
    assert share - 0.06 < result.params_kept <= share
    for name, kept in result.plan.items():
        factored = result.model.get_submodule(name)
        assert kept.rank == factored.rank
        assert factored.first.weight.numel() + factored.second.weight.numel() < net.get_submodule(name).weight.numel()


def test_budget_of_macs_is_met_from_below(trained: Any) -> None:
    net, objective = trained
    result = Joint(macs_kept=0.5, samples=200).compress(net, WhitenedSVD(), objective)
    assert 0.4 < result.macs_kept <= 0.5


def test_loses_less_than_one_ratio_for_all_layers_and_chooses_across_layers(trained: Any) -> None:
    net, objective = trained
    joint = Joint(params_kept=0.3, samples=400).compress(net, SVD("channel"), objective)
    uniform = Truncation(params_kept=0.3).compress(net, SVD("channel"), objective)
    assert objective.evaluate(joint.model, "unseen").loss < 0.8 * objective.evaluate(uniform.model, "unseen").loss
    kept = joint.report["params_after"] / joint.report["params_before"]
    assert kept.max() - kept.min() > 0.1


@pytest.mark.parametrize("way", [{}, {"step": 0.4}, {"ranks": "greedy", "step": 0.5}], ids=str)
def test_tolerance_holds_on_the_verification_split_and_the_log_shows_each_step(trained: Any, way: dict) -> None:
    net, objective = trained
    result = Joint(max_loss_increase=0.02, samples=200, **way).compress(net, WhitenedSVD(), objective)
    dense, small = (objective.evaluate(model, "verification").loss for model in (net, result.model))
    assert small <= dense + 0.02 + 1e-6
    assert result.params_kept < 1
    verified = [entry for entry in result.log if "passed" in entry]
    assert [entry["passed"] for entry in verified] == [
        "verified_change" in entry and entry["verified_change"] + 2 * entry["standard_error"] <= 0.02
        for entry in verified
    ]
    assert {entry["passed"] for entry in verified} == {True, False}
    if "ranks" not in way:
        assert len(verified) == TRIES
        smallest = min(entry["share"] for entry in verified if entry["passed"])
        largest = max(entry["share"] for entry in verified if not entry["passed"])
        assert 0 < smallest - largest < 0.01
        assert smallest - 0.02 < result.params_kept <= smallest


def test_a_search_by_tolerance_expands_the_loss_once(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, objective = trained
    calls = []

    def counted(*args: Any, **more: Any) -> Any:
        calls.append(args[3])
        return gate_gradients(*args, **more)

    gate_gradients = expansion.gate_gradients
    monkeypatch.setattr(expansion, "gate_gradients", counted)
    Joint(max_loss_increase=0.02, samples=200).compress(net, WhitenedSVD(), objective)
    assert calls == [200]
    Joint(params_kept=0.5, samples=200, step=0.25).compress(net, WhitenedSVD(), objective)
    assert calls == [200] * 3


def test_the_model_stays_dense_where_no_share_passes(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, objective = trained
    monkeypatch.setattr(tolerance, "CAUTION", math.inf)
    result = Joint(max_loss_increase=0.5, samples=50, refit=0).compress(net, SVD(), objective)
    assert not result.plan and [entry["passed"] for entry in result.log if "passed" in entry] == [False] * TRIES


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4, 0.2])
def test_the_knapsack_predicts_no_more_than_the_greedy_removal(trained: Any, share: float) -> None:
    """Both see the same expansion, and without interaction their predictions are comparable."""
    net, objective = trained
    one, other = (
        Joint(params_kept=share, samples=200, refit=0, ranks=ranks).compress(net, WhitenedSVD(), objective)
        for ranks in ("knapsack", "greedy")
    )
    assert 0 < one.log[0]["predicted"] <= other.log[0]["predicted"] + 1e-9
    assert max(one.params_kept, other.params_kept) <= share


def test_only_calibration_is_linearised_on_and_only_verification_is_measured_on(trained: Any) -> None:
    net, objective = trained
    with pytest.raises(UserError, match="^verification batches are missing"):
        only = Objective(F.cross_entropy, {"calibration": objective.splits["calibration"]})
        Joint(max_loss_increase=0.0).compress(net, SVD(), only)
    without = {"calibration": objective.splits["calibration"]}
    first = Joint(params_kept=0.5, samples=200).compress(net, SVD(), objective).plan
    assert first == Joint(params_kept=0.5, samples=200).compress(net, SVD(), Objective(F.cross_entropy, without)).plan


def test_a_slope_counts_as_far_as_it_is_certain() -> None:
    noise, signal = torch.randn(400, 2000), torch.tensor([1.0, -2.0, 0.5]).repeat(667)[:2000]
    chance = math.sqrt(2 * math.log(2000))
    assert significant(noise, chance).count_nonzero() < 20
    assert significant(noise, 0.0).equal(noise.double().mean(0))
    torch.testing.assert_close(significant(noise / 100 + signal, chance), signal.double(), atol=1e-2, rtol=1e-2)
    assert (significant(noise + signal, chance) * signal >= 0).all()
    assert significant(torch.zeros(4, 2), chance).tolist() == [0, 0]


def test_labels_change_nothing(trained: Any) -> None:
    net, objective = trained
    others = [(x, (y + 1 + torch.randint(4, y.shape)) % 5) for x, y in objective.splits["calibration"]]
    right, wrong = (
        Joint(params_kept=0.4, samples=200, refit=100).compress(net, WhitenedSVD(), Objective(F.cross_entropy, splits))
        for splits in (objective.splits, {"calibration": others})
    )
    assert right.plan == wrong.plan
    x = others[0][0]
    assert right.model(x).equal(wrong.model(x))


@pytest.mark.parametrize(
    "more", [{"significance": 0.0}, {"interaction": 1.0, "ranks": "greedy"}, {"significance": 4.0}], ids=str
)
def test_the_rest_of_the_expansion_is_taken_where_asked_for(trained: Any, more: dict) -> None:
    net, objective = trained
    usual, other = (
        Joint(params_kept=0.5, samples=200, refit=0, **own).compress(net, SVD(), objective) for own in ({}, more)
    )
    assert (other.log[0]["predicted"] != usual.log[0]["predicted"]) == (more != {"significance": 4.0})
    assert usual.log[0]["predicted"] > 0


def test_refit_lowers_the_loss_and_changes_no_choice(trained: Any) -> None:
    net, objective = trained
    cut, fitted = (
        Joint(params_kept=0.3, samples=400, refit=refit).compress(net, WhitenedSVD(), objective) for refit in (0, 400)
    )
    assert fitted.plan == cut.plan
    losses = [objective.evaluate(one.model, "unseen").loss for one in (fitted, cut)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("ranks", ["knapsack", "greedy"])
def test_a_search_by_tolerance_ends_where_nothing_is_left_to_remove(
    trained: Any, monkeypatch: pytest.MonkeyPatch, ranks: Any
) -> None:
    """A loss that passes whatever is removed: the last component of a layer stays, and the search stops there."""
    calls, advance = [0], joint._JointSearch._advance

    def counted(search: Any, point: Any, share: float) -> Any:
        calls[0] += 1
        assert calls[0] < 50, "the search does not end"
        return advance(search, point, share)

    monkeypatch.setattr(joint._JointSearch, "_advance", counted)
    net, objective = trained
    result = Joint(max_loss_increase=1e9, samples=50, refit=0, ranks=ranks).compress(net, SVD(), objective)
    assert {kept.rank for kept in result.plan.values()} == {1} and len(result.plan) == len(result.report)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({}, "exactly one of"),
        ({"params_kept": 0.5, "max_loss_increase": 0.0}, "exactly one of"),
        ({"params_kept": 1.0}, r"params_kept must lie in \(0, 1\)"),
        ({"macs_kept": 0.0}, r"macs_kept must lie in \(0, 1\)"),
        ({"max_loss_increase": -0.1}, "max_loss_increase must be at least 0"),
        ({"params_kept": 0.5, "step": 0.0}, r"step must lie in \(0, 1\]"),
        ({"params_kept": 0.5, "step": 1.5}, r"step must lie in \(0, 1\]"),
        ({"params_kept": 0.5, "ranks": "best"}, "ranks='best' is none of: 'knapsack', 'greedy'"),
        ({"params_kept": 0.5, "interaction": 0.5}, "^interaction=0.5 needs ranks=greedy: in a knapsack"),
        ({"params_kept": 0.5, "significance": -1.0}, "significance must be at least 0"),
        ({"params_kept": 0.5, "refit": -1}, "refit must be at least 0 samples"),
        ({"params_kept": 0.5, "samples": 1}, "samples must be at least 2"),
    ],
)
def test_bad_settings_are_one_line(bad: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Joint(**bad)


def test_a_budget_out_of_reach_is_refused(trained: Any) -> None:
    net, objective = trained
    with pytest.raises(UserError, match=r"params_kept=0.01 is out of reach: at rank 1 0\.\d+ of them remain"):
        Joint(params_kept=0.01).compress(net, SVD(), objective)


@pytest.mark.parametrize("size", [1, 3])
def test_a_few_layers_at_a_time_are_selected_as_all_at_once(net: nn.Module, objective: Objective, size: int) -> None:
    """Over two steps, so that the second is taken from a model that is cut already."""
    chosen = Joint(params_kept=0.4, step=0.35)
    usual = chosen.compress(net, WhitenedSVD("spatial"), objective)
    spared = chosen.compress(
        copy.deepcopy(net), WhitenedSVD("spatial"), Objective(objective.loss, objective.splits, layers_at_once=size)
    )
    assert usual.plan == spared.plan and usual.log[-1]["predicted"] == pytest.approx(spared.log[-1]["predicted"], 1e-3)
    for key, value in usual.model.state_dict().items():
        torch.testing.assert_close(spared.model.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_blocks_of_layers_see_the_same_samples_of_a_loader_that_shuffles(net: nn.Sequential) -> None:
    generator = torch.Generator()
    samples = TensorDataset(torch.randn(200, 3, 8, 8), torch.randint(5, (200,)))
    loader = DataLoader(samples, batch_size=10, shuffle=True, generator=generator)

    def compressed(size: int | None) -> Any:
        generator.manual_seed(3)
        objective = Objective(F.cross_entropy, {"calibration": loader}, layers_at_once=size)
        return Joint(params_kept=0.5, samples=40, refit=0).compress(net, SVD(), objective)

    usual, spared = compressed(None), compressed(1)
    assert usual.plan == spared.plan
    assert usual.log[-1]["predicted"] == pytest.approx(spared.log[-1]["predicted"], rel=1e-4)
