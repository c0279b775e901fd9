"""The gradient of a split is that of the mean over its samples, however they are batched."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.batches import evaluating
from spectrim.errors import UserError
from spectrim.statistics.gradients import mean_gradients
from spectrim.statistics.objective import Objective

NAMES = ("0", "3", "6")


def objective(batches: Any, loss: Any = F.cross_entropy) -> Objective:
    return Objective(loss, {"calibration": batches})


def test_gradients_are_those_of_the_mean_over_all_samples(net: nn.Sequential, batches: Any) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with evaluating(net):
        loss = F.cross_entropy(net(x), y)
    expected = torch.autograd.grad(loss, [net.get_submodule(name).weight for name in NAMES])
    got = objective(batches).gradients(net, NAMES)
    for name, gradient in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_frozen_model_under_no_grad_has_gradients_too(net: nn.Sequential, batches: Any) -> None:
    expected = objective(batches).gradients(net, NAMES)
    with torch.no_grad():
        got = objective(batches).gradients(net.requires_grad_(False), NAMES)
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


class Branching(nn.Module):
    """Uses its branch where the sum of the inputs is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branch(self.trunk(x)) if x.sum() > 0 else self.trunk(x))


def test_a_batch_that_does_not_use_a_layer_counts_zero_there_and_a_layer_of_no_batch_is_left_out() -> None:
    using, without = ((sign * torch.ones(4, 6), torch.tensor([0, 1, 2, 0])) for sign in (1, -1))
    model, names = Branching(), ["trunk", "branch", "head"]
    both = objective([using, without]).gradients(model, names)
    alone = [objective([batch]).gradients(model, names) for batch in (using, without)]
    assert alone[0].keys() == both.keys() == set(names) and alone[1].keys() == {"trunk", "head"}
    for name in names:
        torch.testing.assert_close(both[name], (alone[0][name] + alone[1].get(name, 0)) / 2)


def test_a_loss_without_a_gradient_is_refused(net: nn.Sequential, batches: Any) -> None:
    judge = objective(batches, lambda logits, targets: F.cross_entropy(logits.detach(), targets))
    with pytest.raises(UserError, match="the loss has no gradient"):
        judge.gradients(net, NAMES)


def counted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss without a gradient, on outputs that are no class scores."""
    return ((outputs - targets).abs() > 0.5).float().mean()


BY_GRADIENT = {
    "joint": (spectrim.Joint(params_kept=0.7), None),
    "lossless": (spectrim.Lossless(), None),
    "refit by the loss": (Refitted(spectrim.Truncation(ratio=0.5), refit_by="loss"), None),
    "two-sided": (spectrim.Truncation(ratio=0.5), "two_sided"),
}


@pytest.mark.parametrize(("algorithm", "decomposer"), BY_GRADIENT.values(), ids=BY_GRADIENT)
def test_what_needs_a_gradient_refuses_a_loss_without_one(algorithm: Any, decomposer: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()
    data = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(2)]
    with pytest.raises(UserError, match="^the loss has no gradient: .* take an algorithm that needs no gradient"):
        spectrim.compress(model, calibration=data, loss=counted, algorithm=algorithm, decomposer=decomposer)


def failing(outputs: Tensor, targets: Tensor) -> Tensor:
    raise KeyError("no such label")


@pytest.mark.parametrize(("loss", "said"), [(counted, "the loss has no gradient"), (failing, "KeyError")])
@pytest.mark.parametrize("algorithm", [spectrim.Truncation(ratio=0.5), Refitted(spectrim.Truncation(ratio=0.5))])
def test_what_needs_none_gives_a_model_and_reports_no_prediction(algorithm: Any, loss: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()
    data = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(2)]
    result = spectrim.compress(model, calibration=data, loss=loss, algorithm=algorithm)
    assert result.params_kept < 1 and result.report["predicted_change"].isna().all()
    with pytest.raises(UserError, match=said):
        _ = result.predicted_change


class Aside(nn.Module):
    """Has a layer on which the first of its outputs does not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), self.aside(x)


@pytest.mark.parametrize("at_once", [None, 1])
def test_a_layer_without_a_gradient_is_no_loss_without_one(at_once: int | None) -> None:
    model, data = Aside().eval(), [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(2)]
    kept = spectrim.compress(
        model,
        calibration=data,
        loss=lambda outputs, targets: F.mse_loss(outputs[0], targets),
        algorithm=spectrim.Truncation(rank=2),
        decomposer="two_sided",
        layers_at_once=at_once,
    )
    assert set(kept.plan) == {"body", "aside"}


def test_the_sums_are_those_of_a_plain_loop_to_the_last_bit(net: nn.Sequential, batches: Any) -> None:
    """Records hold numbers that follow from these: another order of operations would change them."""
    weights = {name: net.get_submodule(name).weight for name in NAMES}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    net.eval()
    for name, parameter in net.named_parameters():  # the kernels of the backward pass depend on what needs a gradient
        parameter.requires_grad_(name in {f"{own}.weight" for own in NAMES})
    for x, y in batches:
        found = torch.autograd.grad(F.cross_entropy(net(x), y), list(weights.values()))
        for name, gradient in zip(NAMES, found, strict=True):
            sums[name] = torch.add(sums[name], gradient, alpha=len(y))
    got = mean_gradients(net, weights, F.cross_entropy, batches, "calibration")  # type: ignore[arg-type]
    assert all(torch.equal(got[name], sums[name] / 39) for name in NAMES)
    assert all(parameter.grad is None for parameter in net.parameters())
