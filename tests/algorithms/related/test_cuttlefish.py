"""Cuttlefish: the stable rank it watches, when it switches, what it switches to, and that a kill changes nothing."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.algorithms.related import cuttlefish
from spectrim.algorithms.related.cuttlefish import Cuttlefish, random_stable_rank, scaled_stable_rank
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.linalg import stable_rank
from spectrim.statistics.objective import Objective
from spectrim.training.fit import Training, fit
from spectrim.training.recipe import Recipe

RECIPE = Recipe(epochs=6, lr=0.05, precision="float32", warmup=0.0)
STILL = replace(RECIPE, lr=1e-9)  # no slope is above 0
VIEWS: Any = ("channel", "spatial")


def test_the_scaled_stable_rank_of_a_flat_spectrum_is_full() -> None:
    assert scaled_stable_rank(torch.full((1, 8), 3.0), initial=8.0) == 8
    falling = 0.5 ** torch.arange(8.0)
    assert float(stable_rank(falling)) == pytest.approx(4 / 3, rel=1e-4)
    assert scaled_stable_rank(falling.unsqueeze(0), initial=float(stable_rank(falling))) == 8  # full at the start
    assert scaled_stable_rank(torch.stack([falling, torch.ones(8)]), initial=8.0) == 8  # the group that needs most


@pytest.mark.parametrize("shape", [(300, 300), (400, 100)])
def test_the_stable_rank_of_a_random_matrix_is_known(shape: tuple[int, int]) -> None:
    drawn = float(stable_rank(torch.linalg.svdvals(torch.randn(shape))))
    assert random_stable_rank(*shape) == pytest.approx(drawn, rel=0.05)


def switched_after(result: Any) -> list[int]:
    return [entry["epoch"] + 1 for entry in result.log if entry["switched"]]


def test_it_switches_once_the_stable_ranks_are_flat(net: nn.Module, objective: Objective) -> None:
    def of(**changed: Any) -> list[int]:
        chosen = Cuttlefish(**({"recipe": STILL, "latest": 1.0, "xi": 0.1} | changed))
        return switched_after(chosen.compress(net, SVD(), objective))

    assert of(window=2) == [2] and of(window=3) == [3]
    assert of(recipe=replace(STILL, warmup=0.5), window=1) == [4]  # not on what the warm-up shows
    assert of(recipe=RECIPE, slope=0.0) == [6] and of(recipe=RECIPE, slope=0.0, latest=0.5) == [3]
    assert of(recipe=replace(STILL, epochs=1)) == [1]


@pytest.mark.parametrize("view", VIEWS)
def test_until_the_switch_the_dense_net_is_trained(net: nn.Module, objective: Objective, view: Any) -> None:
    dense = copy.deepcopy(net)
    curve = fit(dense, objective.splits["train"], Training(RECIPE, 0))
    late = Cuttlefish(recipe=RECIPE, slope=0.0, latest=1.0, xi=0.3).compress(net, SVD(view), objective)
    for ours, plain in zip(late.log, curve, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    early = Cuttlefish(recipe=RECIPE, slope=0.0, latest=0.5, xi=0.3).compress(net, SVD(view), objective)
    assert [entry["loss"] for entry in early.log[:3]] == [entry["loss"] for entry in late.log[:3]]
    assert early.log[3]["loss"] > late.log[3]["loss"]  # something was cut


@pytest.mark.parametrize("view", VIEWS)
def test_ranks_are_those_of_the_stable_ranks_at_the_switch(net: nn.Module, objective: Objective, view: Any) -> None:
    result = Cuttlefish(recipe=RECIPE, xi=0.4, latest=0.5, slope=0.0).compress(net, SVD(view), objective)
    stable, ranks = result.log[2]["stable_ranks"], result.log[-1]["ranks"]
    assert list(ranks) == ["3", "6", "8"] and "0" not in result.plan  # the first layer stays dense
    for name, kept in result.plan.items():
        assert kept.rank == ranks[name] == math.ceil(0.4 * stable[name])
    for name in ranks.keys() - result.plan.keys():
        spectrum = spectrum_of(net.get_submodule(name), SVD(view))
        assert ranks[name] == spectrum.max_rank and math.ceil(0.4 * stable[name]) > spectrum.break_even
    assert len(result.plan) >= 2
    everything = Cuttlefish(recipe=RECIPE, xi=0.4, dense_first=0).compress(net, SVD(view), objective)
    assert "0" in everything.log[-1]["ranks"]


def watched(outputs: int, inputs: int) -> tuple[nn.Linear, cuttlefish._Watched]:
    layer = nn.Linear(inputs, outputs, bias=False)
    spectrum = SVD().spectrum(layer)
    return layer, cuttlefish._Watched(layer, cuttlefish._DenseThenFactors(spectrum, "channel", 1.0, epochs=1))


def test_the_switch_shares_the_singular_values_evenly_between_the_best_factors_of_the_rank() -> None:
    layer, one = watched(7, 5)
    U, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    one.factor(3, torch.optim.SGD(layer.parameters(), lr=0.1))
    torch.testing.assert_close(layer.weight.detach(), U[:, :3] * S[:3] @ Vh[:3])
    for gram in (one.left[0].T @ one.left[0], one.right[0] @ one.right[0].T):
        torch.testing.assert_close(gram.detach(), S[:3].diag(), atol=1e-5, rtol=1e-5)


def test_no_bounded_step_on_a_factor_moves_the_weight_further_than_its_own_gradient() -> None:
    """The loss is <W, G>. The factors are large, so that an unbounded step would move the weight far."""
    layer, one = watched(7, 5)
    one.bound_steps()
    one.factor(1, torch.optim.SGD(layer.parameters(), lr=0.1))
    G_OI, lr = torch.randn(7, 5), 1e-3
    with torch.no_grad():
        one.left.mul_(5.0)
        one.right.mul_(7.0)
    (layer.weight * G_OI).sum().backward()
    before = layer.weight.detach().clone()
    for part in (one.left, one.right):
        start, gradient = part.detach().clone(), part.grad
        assert gradient is not None
        with torch.no_grad():
            part.sub_(lr * gradient)
            assert 0 < (layer.weight - before).norm() <= lr * G_OI.norm() * (1 + 1e-3)
            part.copy_(start)


def test_from_its_own_start_a_net_that_stands_still_keeps_all_its_rank(net: nn.Module, objective: Objective) -> None:
    result = Cuttlefish(recipe=STILL, reference="start").compress(net, SVD(), objective)
    assert result.params_kept == 1 and not result.plan


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_a_budget_is_met_from_below(net: nn.Module, objective: Objective, view: Any, bounded: bool) -> None:
    chosen = Cuttlefish(recipe=RECIPE, params_kept=0.5, dense_first=0, bounded=bounded)
    assert 0.4 < chosen.compress(net, SVD(view), objective).params_kept <= 0.5


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("killed_in", [1, 4])  # before the switch after epoch 3, and behind it
def test_an_interrupted_training_goes_on_to_the_same_model(
    killed_in: int, net: nn.Module, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = str(tmp_path / "state.safetensors")
    chosen = Cuttlefish(recipe=RECIPE, params_kept=0.5, window=2, dense_first=0)
    unbroken = chosen.compress(net, SVD(), objective)
    usual = cuttlefish._Callbacks.after_epoch

    def killed(self: Any, epoch: int, model: nn.Module, optimizer: Any) -> dict:
        if epoch == killed_in:
            raise Interrupted
        return usual(self, epoch, model, optimizer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(cuttlefish._Callbacks, "after_epoch", killed)
        replace(chosen, state=state).compress(net, SVD(), objective)
    resumed = replace(chosen, state=state).compress(net, SVD(), objective)
    assert resumed.plan == unbroken.plan and switched_after(resumed) == switched_after(unbroken)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        replace(chosen, state=state, xi=0.2).compress(net, SVD(), objective)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"xi": 0.0}, "expected xi > 0"),
        ({"slope": math.nan}, "slope >= 0, both finite"),
        ({"params_kept": 1.0}, r"params_kept must lie in \(0, 1\)"),
        ({"window": 0}, "expected window >= 1"),
        ({"dense_first": -1}, "dense_first >= 0"),
        ({"latest": 0.0}, "latest, a part of the epochs"),
        ({"reference": "end"}, "reference='end' is none of: 'start', 'random'"),
    ],
)
def test_settings_that_cannot_work_are_one_line(bad: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Cuttlefish(**bad)


def test_what_it_cannot_work_with_is_one_line(net: nn.Module, objective: Objective, batches: Any) -> None:
    with pytest.raises(UserError, match="Cuttlefish needs the plain SVD .*, not WhitenedSVD"):
        Cuttlefish(recipe=RECIPE).compress(net, WhitenedSVD(), objective)
    with pytest.raises(UserError, match="^train batches are missing; pass train="):
        Cuttlefish(recipe=RECIPE).compress(net, SVD(), Objective(objective.loss, {"calibration": batches}))
    with pytest.raises(UserError, match="dense_first=9 leaves none of 4 layers"):
        Cuttlefish(recipe=RECIPE, dense_first=9).compress(net, SVD(), objective)
    with pytest.raises(UserError, match="params_kept=0.1 is out of reach of this rule"):
        Cuttlefish(recipe=RECIPE, dense_first=2, params_kept=0.1).compress(net, SVD(), objective)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets) * (math.nan if outputs.requires_grad else 1.0)

    with pytest.raises(UserError, match="became nan in epoch 0, step 0; lower lr; nothing is kept"):
        Cuttlefish(recipe=RECIPE).compress(net, SVD(), Objective(broken, {"calibration": batches, "train": batches}))
