"""l0 gates and HALOC: what their papers say of them, their budgets, and that a kill costs no more than an epoch."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.algorithms.related import gated_training
from spectrim.algorithms.related.gated_training import GatedLayer, GatedTraining, GatedWeight
from spectrim.algorithms.related.haloc import HALOC
from spectrim.algorithms.related.l0_gates import L0Gates
from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.training.recipe import Recipe
from spectrim.training.svd_weights import bound_steps, set_parametrization, svd_of

RECIPE = Recipe(epochs=4, lr=0.05, precision="float32", warmup=0.0)
METHODS: Any = [L0Gates, HALOC]
PLANTED: Any = [L0Gates(rate=10.0), HALOC(rate=3.0)]


def planted() -> tuple[nn.Sequential, Objective]:
    """A net whose first layer has rank 2 and whose second has a flat spectrum; the task is to go on as it is."""
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        for layer, S in ((net[0], torch.tensor([2.0] * 2 + [0.0] * 14)), (net[2], torch.ones(16))):
            U, _, Vh = torch.linalg.svd(torch.randn(16, 16))
            layer.weight.copy_(U @ torch.diag(S) @ Vh)  # type: ignore[operator]
        x = torch.randn(512, 16)
        batches = list(zip(x.split(32), net(x).split(32), strict=True))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).mean()

    return net, Objective(loss, {"calibration": batches, "train": batches})


@pytest.mark.parametrize("method", PLANTED, ids=lambda method: type(method).__name__)
def test_a_layer_planted_as_low_rank_becomes_so_and_one_that_needs_all_its_rank_stays(method: GatedTraining) -> None:
    """The median of five draws: a search by drawn candidates misses now and then."""
    recipe = Recipe(epochs=20, lr=0.02, precision="float32", weight_decay=0.0)
    found = []
    for draw in range(5):
        torch.manual_seed(draw)
        net, objective = planted()
        result = replace(method, recipe=recipe).compress(net, SVD(), objective)
        found.append((*result.log[-1]["ranks"].values(), objective.evaluate(result.model).loss))
    low, flat, loss = (sorted(values)[2] for values in zip(*found, strict=True))
    assert 2 <= low <= 3 and flat == 16 and loss < 0.02


def gated(method: GatedTraining, layer: nn.Linear) -> GatedLayer:
    spectrum = SVD().spectrum(layer)
    set_parametrization(layer, GatedWeight(spectrum, method.gate(spectrum, layer.weight.numel())))
    bound_steps(layer)
    return GatedLayer(layer, method.rate)


def test_l0_gates_are_open_with_the_probability_that_the_penalty_says() -> None:
    method, layer = L0Gates(sigma=0.5), nn.Linear(12, 10)
    one = gated(method, layer)
    with torch.no_grad():
        one.parameter.copy_(torch.linspace(-2.2, 0.3, 10))
    drawn = torch.stack([one.weight.gate(one.parameter.detach()) for _ in range(4000)])
    assert drawn.min() == 0 and drawn.max() == 1
    frequency = float((drawn > 0).double().mean())
    assert method.penalty({"0": one}, None).item() == pytest.approx(frequency, abs=0.01)
    assert torch.equal(one.eval_gates(), (one.parameter.detach() + 1.2).clamp(0, 1))


def test_haloc_mixes_truncations_by_their_probabilities() -> None:
    layer = nn.Linear(12, 10, bias=False)
    dense = layer.weight.detach().clone()
    spectrum = SVD().spectrum(layer)
    one = gated(HALOC(ratios=(0.4, 0.8)), layer)
    ranks = one.weight.gate.ranks
    assert ranks == (int(0.4 * 120 / 22), int(0.8 * 120 / 22), 10)
    torch.manual_seed(5)
    chances = nn.functional.gumbel_softmax(one.parameter.detach(), dim=0)
    U, S, Vh = (part[0] for part in spectrum.svd)
    cuts = [(U[:, :k] * S[:k] @ Vh[:k]).float() for k in ranks]
    torch.manual_seed(5)
    mixed = sum(float(p) * cut for p, cut in zip(chances, cuts, strict=True))
    torch.testing.assert_close(layer.weight.detach(), mixed)
    with torch.no_grad():
        one.parameter[0] = 1.0
    layer.eval()
    torch.testing.assert_close(layer.weight.detach(), cuts[0])
    assert float((cuts[2] - dense).abs().max()) < 1e-6


def layers_of_two(method: GatedTraining) -> tuple[dict[str, GatedLayer], Costs]:
    """Two gated layers with logits drawn at random, and what they cost."""
    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    objective = Objective(nn.functional.cross_entropy, {"calibration": [(torch.randn(4, 12), torch.zeros(4).long())]})
    costs = costs_of(Workbench.of(net, SVD(), objective), "params")
    layers = {name: gated(method, net.get_submodule(name)) for name in costs.dense}
    for name, one in layers.items():
        one.gate.set_saved(costs.saved(name))
        with torch.no_grad():
            one.parameter.copy_(torch.randn(len(one.parameter)))
    return layers, costs


def test_haloc_pays_for_the_expected_cost_of_the_whole_model_above_the_budget() -> None:
    method = HALOC(ratios=(0.3, 0.6))
    layers, costs = layers_of_two(method)
    expected = 0.0
    choices = [list(zip(one.gate.ranks, one.parameter.softmax(0).tolist(), strict=True)) for one in layers.values()]
    for (rank, p), (other, q) in itertools.product(*choices):
        expected += p * q * costs.achieved(dict(zip(layers, (rank, other), strict=True)))
    assert 0.3 < expected < 1
    assert method.penalty(layers, None).item() == pytest.approx(expected, rel=1e-5)
    assert method.penalty(layers, 0.25).item() == pytest.approx(expected - 0.25, rel=1e-5)
    assert method.penalty(layers, 0.999).item() == 0


def test_the_penalty_on_l0_gates_rests_while_the_open_ones_meet_the_budget() -> None:
    method = L0Gates()
    layers, costs = layers_of_two(method)
    for one in layers.values():
        with torch.no_grad():
            one.parameter[2:] = -3.0  # closed
    share = costs.achieved({name: int(one.eval_gates().count_nonzero()) for name, one in layers.items()})
    assert method.penalty(layers, share + 0.01).item() == 0
    assert method.penalty(layers, share - 0.01).item() == method.penalty(layers, None).item() > 0


def test_haloc_updates_weights_and_probabilities_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    net, objective = planted()
    turns: list[tuple[bool, bool]] = []  # whether weights, and whether probabilities, have a gradient
    usual = torch.optim.SGD.step

    def watched(optimizer: Any, *_: Any) -> Any:
        parts = [p for group in optimizer.param_groups for p in group["params"]]
        factors = [p.grad is not None for p in parts if p.ndim == 3]
        logits = [p.grad is not None for p in parts if p.ndim == 1]
        assert len(set(factors)) == len(set(logits)) == 1
        turns.append((factors[0], logits[0]))
        return usual(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    HALOC(recipe=replace(RECIPE, epochs=1), refine=0.0).compress(net, SVD(), objective)
    assert turns[:4] == [(False, True), (True, False)] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"params_kept": 0.5}, {"macs_kept": 0.5}], ids=str)
@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_a_budget_is_met_from_below(
    method: Any, budget: dict, view: Any, net: nn.Sequential, objective: Objective
) -> None:
    result = method(recipe=RECIPE, **budget).compress(net, SVD(view), objective)
    kept = result.params_kept if "params_kept" in budget else result.macs_kept
    assert 0.3 < kept <= 0.5
    ranks = result.log[-1]["ranks"]
    assert {name: own.rank for name, own in result.plan.items()}.items() <= ranks.items()


@pytest.mark.parametrize("method", METHODS)
def test_absorbed_gates_leave_the_function_of_the_gates_without_noise(method: Any) -> None:
    layer = nn.Linear(12, 10)
    one = gated(method(), layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(7, 12)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    layer.eval()
    with torch.no_grad():
        one.parameter[4:] = -1.3
    before, kept = layer(x), one.eval_gates()
    one.absorb_gates(kept, optimizer)
    torch.testing.assert_close(layer(x), before)
    assert svd_of(layer).S_R.shape == (1, int(kept.count_nonzero()))


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("killed_in", [1, 3])  # while gates are learnt, and after they are gone
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_to_the_same_model(
    method: Any, killed_in: int, net: nn.Module, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = str(tmp_path / "state.safetensors")
    chosen = method(recipe=RECIPE, params_kept=0.5, refine=0.5)
    unbroken = chosen.compress(net, SVD(), objective)
    usual = gated_training._Callbacks.after_epoch

    def killed(self: Any, epoch: int, model: nn.Module, optimizer: Any) -> dict:
        if epoch == killed_in:
            raise Interrupted
        return usual(self, epoch, model, optimizer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(gated_training._Callbacks, "after_epoch", killed)
        replace(chosen, state=state).compress(net, SVD(), objective)
    resumed: Compressed = replace(chosen, state=state).compress(net, SVD(), objective)
    assert resumed.plan == unbroken.plan
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        replace(chosen, state=state, strength=0.2).compress(net, SVD(), objective)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_one_line(method: Any, net: nn.Module, objective: Objective, batches: Any) -> None:
    for bad, said in (
        ({"params_kept": 0.5, "macs_kept": 0.5}, "at most one of params_kept and macs_kept"),
        ({"params_kept": 1.5}, r"in \(0, 1\)"),
        ({"strength": -1.0}, "expected strength >= 0"),
        ({"rate": math.inf}, "rate > 0, both finite"),
        ({"refine": 1.0}, "refine, a part of the epochs"),
    ):
        with pytest.raises(UserError, match=said):
            method(**bad)
    with pytest.raises(UserError, match="sigma, the noise on the gates"):
        L0Gates(sigma=0.0)
    with pytest.raises(UserError, match="temperature must be finite"):
        HALOC(temperature=0.0)
    with pytest.raises(UserError, match=r"ratios must lie in \(0, 1\)"):
        HALOC(ratios=())
    with pytest.raises(
        UserError,
        match=f"{method.__name__} needs the plain SVD .*, not WhitenedSVD",
    ):
        method(recipe=RECIPE).compress(net, WhitenedSVD(), objective)
    with pytest.raises(UserError, match="^train batches are missing; pass train="):
        method(recipe=RECIPE).compress(net, SVD(), Objective(objective.loss, {"calibration": batches}))
    with pytest.raises(UserError, match="params_kept=0.05 is out of reach"):
        method(recipe=RECIPE, params_kept=0.05).compress(net, SVD(), objective)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_breaks_is_one_line(method: Any, net: nn.Module, batches: Any) -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets) * (math.nan if outputs.requires_grad else 1.0)

    with pytest.raises(UserError, match="became nan in epoch 0, step 0; lower lr; nothing is kept"):
        method(recipe=RECIPE).compress(net, SVD(), Objective(broken, {"calibration": batches, "train": batches}))
