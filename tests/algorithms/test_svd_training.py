"""Algorithm 3: what it trains, when it cuts, and that a kill or a loss that breaks costs no more than an epoch."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms import svd_training
from spectrim.algorithms.svd_training import SVDTraining
from spectrim.decomposers.matrix import to_matrix
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.statistics.objective import Objective
from spectrim.training.recipe import Recipe

RECIPE = Recipe(epochs=4, lr=0.05, precision="float32", warmup=0.0)
VIEWS: Any = ("channel", "spatial")


def chosen(**changed: Any) -> SVDTraining:
    return SVDTraining(**({"recipe": RECIPE, "epsilon": 0.1, "delta_step": 0.1} | changed))


class Teacher:
    """Classes that a net of low rank tells apart: the sign pattern of two directions of the inputs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(256, 20, generator=generator)
        directions = torch.randn(20, 2, generator=generator)
        y = ((x @ directions > 0).long() * torch.tensor([1, 2])).sum(1)
        self.batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
        self.objective = Objective(F.cross_entropy, {"calibration": self.batches, "train": self.batches})


def student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


@pytest.mark.parametrize("regulariser", ["nuclear", "hoyer"])
def test_a_task_of_low_rank_is_learnt_from_scratch_at_low_rank(regulariser: Any) -> None:
    teacher = Teacher()
    recipe = Recipe(epochs=40, lr=0.05, precision="float32", weight_decay=0.0)
    algorithm = SVDTraining(recipe=recipe, regulariser=regulariser, strength=0.01, epsilon=0.02, warm_up=10)
    result = algorithm.compress(student(), SVD(), teacher.objective)
    found = teacher.objective.evaluate(result.model)
    assert found.accuracy is not None and found.accuracy > 0.95
    assert result.plan["0"].rank <= 6 and result.params_kept < 0.6


@pytest.mark.parametrize("view", VIEWS)
def test_ranks_only_fall_and_are_those_of_the_result(net: nn.Module, objective: Objective, view: Any) -> None:
    result = chosen().compress(net, SVD(view), objective)
    ranks = [entry["ranks"] for entry in result.log]
    for before, after in itertools.pairwise(ranks):
        assert all(after[name] <= before[name] for name in after)
    assert [entry["rank"] for entry in result.log] == [sum(of.values()) for of in ranks]
    break_even = dict(zip(result.report["layer"], result.report["break_even"], strict=True))
    assert {n: kept.rank for n, kept in result.plan.items()} == {
        n: k for n, k in ranks[-1].items() if k <= break_even[n]
    }
    for name, rank in ranks[-1].items():
        if name not in result.plan:  # folded back to dense, at the rank it has
            layer: Any = result.model.get_submodule(name)
            assert type(layer) in (nn.Linear, nn.Conv2d)
            matrix = to_matrix(layer.weight.detach(), DenseLayer.of(layer), view)
            assert int(torch.linalg.matrix_rank(matrix, rtol=1e-4).max()) == rank


def test_each_selection_returns_a_cut_that_passed_in_as_many_steps_as_the_step_of_delta_asks(
    net: nn.Module, objective: Objective
) -> None:
    log = chosen(delta_step=0.01).compress(net, SVD(), objective).log
    for entry in log:
        start, *steps = entry["bisection"]
        assert start["delta"] == 0 and start["passed"] and len(steps) == 7  # ceil(log2(100))
        for step in steps:
            assert step["passed"] == (abs(step["loss"] - start["loss"]) < 0.1)
        best = max((step for step in entry["bisection"] if step["passed"]), key=lambda step: step["delta"])
        assert best["rank_kept"] == min(step["rank_kept"] for step in entry["bisection"] if step["passed"])


def test_the_last_selection_moves_the_loss_by_less_than_epsilon(net: nn.Module, objective: Objective) -> None:
    result = chosen(epsilon=0.05).compress(net, SVD(), objective)
    before = result.log[-1]["bisection"][0]["loss"]
    assert abs(objective.evaluate(result.model, "train").loss - before) < 0.05 + 1e-5


def test_selection_keeps_to_its_epochs(net: nn.Module, objective: Objective) -> None:
    recipe = replace(RECIPE, epochs=7)
    algorithm = chosen(recipe=recipe, every=2, warm_up=1, cool_down=1)
    log = algorithm.compress(net, SVD(), objective).log
    assert [bool(entry["bisection"]) for entry in log] == [False, False, True, False, True, False, False]
    # The regulariser is there until the last of them.
    assert ["hoyer" in entry for entry in log] == [True, True, True, True, True, False, False]


def test_the_terms_of_the_loss_are_those_that_were_asked_for(net: nn.Module, objective: Objective) -> None:
    def terms(**changed: Any) -> set[str]:
        return chosen(**changed).compress(net, SVD(), objective).log[0].keys() & {"orthogonality", "hoyer", "nuclear"}

    assert terms() == {"orthogonality", "hoyer"}
    assert terms(regulariser="nuclear", orthogonality=0.0) == {"nuclear"}
    assert terms(regulariser="none") == {"orthogonality"} and terms(strength=0.0) == {"orthogonality"}


def test_orthogonality_keeps_the_factors_near_orthonormal(net: nn.Module, objective: Objective) -> None:
    def distance(weight: float) -> float:
        log = chosen(orthogonality=weight, warm_up=99).compress(net, SVD(), objective).log
        return log[-1]["orthogonality"] / weight

    assert distance(1.0) < distance(1e-9)


class Interrupted(Exception):
    """Stands for a kill."""


def test_an_interrupted_training_goes_on_to_the_same_model(
    net: nn.Module, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = chosen().compress(net, SVD(), objective)
    read = dict(objective.read)
    state = str(tmp_path / "state.safetensors")
    usual = svd_training._Callbacks.after_epoch

    def killed(self: Any, epoch: int, model: nn.Module, optimizer: Any) -> dict:
        if epoch == 2:
            raise Interrupted
        return usual(self, epoch, model, optimizer)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(svd_training._Callbacks, "after_epoch", killed)
        chosen(state=state).compress(net, SVD(), objective)
    objective.start_selection()
    resumed = chosen(state=state).compress(net, SVD(), objective)
    assert resumed.plan == unbroken.plan and objective.read == read
    assert [entry["bisection"] for entry in resumed.log] == [entry["bisection"] for entry in unbroken.log]
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        chosen(state=state, epsilon=0.2).compress(net, SVD(), objective)


@pytest.mark.parametrize("kept", [True, False])
def test_a_loss_that_breaks_keeps_the_last_good_epoch_and_says_so(
    net: nn.Module, batches: Any, tmp_path: Path, kept: bool
) -> None:
    calls = 0

    def breaking(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad  # not while ranks are selected
        return F.cross_entropy(outputs, targets) * (float("nan") if calls > 7 else 1.0)

    objective = Objective(breaking, {"calibration": batches, "train": batches})
    state = tmp_path / "state.safetensors"
    said = rf"became nan in epoch 2, step 1; lower lr; {f'the last good epoch is in {state}' if kept else 'nothing is'}"
    with pytest.raises(UserError, match=said):
        chosen(state=str(state) if kept else None, warm_up=9).compress(net, SVD(), objective)
    assert state.exists() == kept


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epsilon": 0.0}, "epsilon, a change of the loss, must be finite and above 0"),
        ({"epsilon": float("nan")}, "must be finite and above 0"),
        ({"delta_step": 0.0}, r"delta_step must lie in \(0, 1\)"),
        ({"delta_step": 1.0}, r"delta_step must lie in \(0, 1\)"),
        ({"subset": 0}, "subset must be at least 1"),
        ({"strength": -1.0}, "strength and orthogonality are at least 0"),
        ({"orthogonality": float("inf")}, "strength and orthogonality are at least 0"),
        ({"every": 0}, "every must be at least 1"),
        ({"regulariser": "l2"}, "regulariser='l2' is none of: 'nuclear', 'hoyer', 'none'"),
        ({"epsilon": True}, "is not of type"),
    ],
)
def test_settings_that_cannot_work_are_one_line(bad: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(**bad)


def test_what_it_cannot_start_from_is_one_line(net: nn.Module, objective: Objective, batches: Any) -> None:
    with pytest.raises(UserError, match="needs the plain SVD .*, not WhitenedSVD"):
        chosen().compress(net, WhitenedSVD(), objective)
    with pytest.raises(UserError, match="^train batches are missing; pass train="):
        chosen().compress(net, SVD(), Objective(F.cross_entropy, {"calibration": batches}))
    with pytest.raises(UserError, match="subset=999 is more than the"):
        chosen(subset=999).compress(net, SVD(), objective)


def test_a_price_spares_the_layers_whose_ranks_cost_little() -> None:
    """A rank of the first layer costs 50 numbers, of the second 34."""
    net, teacher = student(), Teacher()
    with torch.no_grad():
        for layer, S_R in ((net[0], torch.linspace(1, 0.01, 20)), (net[2], torch.tensor([1, 0.7, 0.45, 0.1]))):
            U, _, Vh = torch.linalg.svd(layer.weight, full_matrices=False)  # type: ignore[arg-type]
            layer.weight.copy_(U * S_R @ Vh)
    tried: dict[bool, list[tuple]] = {}
    for priced in (False, True):
        quiet = Recipe(epochs=1, lr=1e-9, precision="float32")
        log = chosen(recipe=quiet, priced=priced, regulariser="none", epsilon=1e9).compress(
            net, SVD(), teacher.objective
        )
        tried[priced] = [(step["delta"], step["rank_kept"]) for step in log.log[0]["bisection"]]
    at_half = {priced: dict(steps)[0.5] for priced, steps in tried.items()}
    # Of 20 + 4 components: 0.5 keeps 10 + 2; with the price the second layer's threshold is 0.5 * sqrt(34 / 50).
    assert at_half[False] == pytest.approx((10 + 2) / 24)
    assert at_half[True] == pytest.approx((10 + 3) / 24)
