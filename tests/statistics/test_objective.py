"""What an objective answers about a model, what it leaves of the model, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.rank_selection import RankSelection
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

NAMES = ("0", "3", "6")


def objective(batches: Any, loss: Any = F.cross_entropy) -> Objective:
    return Objective(loss, {"calibration": batches})


def test_the_model_is_left_as_it_was(net: nn.Sequential, batches: Any) -> None:
    net[1].eval()
    net[3].weight.requires_grad_(False)
    net[8].weight.grad = torch.ones_like(net[8].weight)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    judge = objective(batches)
    judge.evaluate(net)
    judge.gradients(net, NAMES)
    assert all(
        torch.equal(value, before[name]) for name, value in net.state_dict().items()
    )  # BatchNorm's statistics too
    assert [m.training for m in net.modules()] == modes
    assert not net[3].weight.requires_grad and net[0].weight.requires_grad
    assert net[0].weight.grad is None and torch.equal(net[8].weight.grad, torch.ones(5, 24))


def test_the_gradient_pass_is_done_once_until_the_model_changes(net: nn.Sequential, batches: Any) -> None:
    passes = []

    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled() and logits.requires_grad:  # not where the loss itself is checked
            passes.append(len(targets))
        return F.cross_entropy(logits, targets)

    judge = objective(batches, counted)
    first = judge.gradients(net, NAMES)
    assert judge.gradients(net, NAMES) is first and len(passes) == 3
    for change in (net[0].weight.data.mul_, net[1].running_mean.add_):  # neither shows in the weight's version
        change(1.5)
        second = judge.gradients(net, NAMES)
        assert not torch.equal(second["0"], first["0"])
        first = second
    assert len(passes) == 9


@pytest.mark.parametrize(("size", "passes"), [(1, 3), (2, 2), (3, 1), (9, 1), (None, 1)])
def test_gradients_in_blocks_are_the_same_and_no_more_of_them_are_held(
    net: nn.Sequential, batches: Any, monkeypatch: pytest.MonkeyPatch, size: int | None, passes: int
) -> None:
    expected, grad = objective(batches).gradients(net, NAMES), torch.autograd.grad
    held = []

    def watched(loss: Tensor, weights: list[Tensor], *rest: Any, **settings: Any) -> Any:
        held.append(len(weights))
        return grad(loss, weights, *rest, **settings)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    judge = Objective(F.cross_entropy, {"calibration": batches}, layers_at_once=size)
    got = dict(judge.each_gradient(net, NAMES))
    assert list(got) == list(NAMES) and all(torch.equal(got[name], expected[name]) for name in NAMES)
    assert max(held) <= (size or 3) and len(held) == passes * len(batches)


def test_an_algorithm_finds_the_same_with_gradients_in_blocks(net: nn.Sequential, batches: Any) -> None:
    seen = []

    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled() and logits.requires_grad:  # not where the loss itself is checked
            seen.append(len(targets))
        return F.cross_entropy(logits, targets)

    whole, blocks = (
        spectrim.compress(net, calibration=batches, loss=counted, algorithm=Lossless(gamma=None), layers_at_once=size)
        for size in (None, 2)
    )
    assert whole.plan == blocks.plan and whole.report.equals(blocks.report)
    assert len(seen) == (1 + 2) * len(batches)  # all four layers at once; two of them, twice


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_of_blocks_that_is_none_is_refused(batches: Any, size: Any) -> None:
    with pytest.raises(UserError, match="layers_at_once must be a whole number of at least 1, or None; got"):
        Objective(F.cross_entropy, {"calibration": batches}, layers_at_once=size)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_batches_may_hold_tuples_and_mappings(as_mapping: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"out": self.fc(a * b)}

    a, b, target = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 3)
    inputs = {"b": b, "a": a} if as_mapping else (a, b)
    model = Both()
    judge = objective([(inputs, {"wanted": target})], lambda out, targets: F.mse_loss(out["out"], targets["wanted"]))
    measured = judge.evaluate(model)
    assert measured.loss == pytest.approx(F.mse_loss(model.fc(a * b), target).item()) and measured.n == 5
    assert measured.accuracy is None
    assert judge.gradients(model, ["fc"])["fc"].shape == (3, 4)


CALLS = [lambda judge, model: judge.evaluate(model), lambda judge, model: judge.gradients(model, NAMES)]


@pytest.mark.parametrize("call", CALLS)
def test_an_empty_calibration_set_is_refused(net: nn.Sequential, call: Any) -> None:
    with pytest.raises(UserError, match="calibration split is empty"):
        call(objective([]), net)
    with pytest.raises(UserError, match="calibration split is empty"):
        objective([]).example()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(net: nn.Sequential, batches: Any, call: Any, value: float) -> None:
    judge = objective(batches, lambda logits, targets: logits.sum() * value)
    with pytest.raises(UserError, match="loss on the calibration split is (nan|inf|-inf)"):
        call(judge, net)
    assert net.training


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 5, 0]), "target 5 does not fit a model with 5 classes"),
        (torch.tensor([0, 1, -3, 0]), "the loss failed on these outputs and targets"),
        (torch.tensor([0, 1, 2]), "4 rows of logits for 3 targets"),
        (torch.zeros(4, 2, dtype=torch.long), "the loss failed on these outputs and targets"),
        (torch.zeros(4), "the loss failed on these outputs and targets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(net: nn.Sequential, call: Any, targets: Tensor, message: str) -> None:
    judge = objective([(torch.randn(4, 3, 8, 8), targets)])
    with pytest.raises(UserError, match=message) as refusal:
        call(judge, net)
    assert "\n" not in str(refusal.value)


def test_what_models_have_seen_is_counted(net: nn.Sequential, objective: Objective) -> None:
    objective.evaluate(net)
    objective.evaluate(net, "verification")
    assert objective.read == {"calibration": 39, "verification": 23}
    for _ in range(2):  # the second time they are remembered
        objective.gradients(net, ["0"])
    assert objective.read["calibration"] == 2 * 39
    assert len(list(objective.first("calibration", 20, "batches"))) == 2
    assert objective.read["calibration"] == 2 * 39 + 32
    assert objective.loss_within(net, "calibration", 1e-9, 39) is None  # known after the first batch
    assert objective.read["calibration"] == 2 * 39 + 32 + 16


def test_what_rank_selection_sees_of_a_part_is_counted(net: nn.Sequential, objective: Objective) -> None:
    RankSelection(subset=20, delta_step=0.4).compress(net, SVD(), objective)
    assert objective.read["calibration"] >= 2 * 20 and objective.read["calibration"] % 20 == 0


def test_an_objective_on_other_batches_counts_what_is_read_with_the_first(net: nn.Sequential, batches: Any) -> None:
    judge = objective(batches)
    judge.on({"few": batches[:1]}).evaluate(net, "few")
    held = judge.held("calibration", 17)
    assert [len(targets) for _, targets in held.splits["calibration"]] == [16, 16]
    assert judge.read == {"few": 16}  # to hold samples passes none through a model
    judge.gradients(net, NAMES)
    assert not torch.equal(held.gradients(net, NAMES)["0"], judge.gradients(net, NAMES)["0"])
    assert judge.read == {"few": 16, "calibration": 39 + 32}
