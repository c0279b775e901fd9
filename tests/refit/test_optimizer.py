"""The optimizer of a refinement: how far its steps go, and that they are taken up where they stopped."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spectrim.refit.optimizer import Optimizer


def weights() -> dict[str, nn.Parameter]:
    shapes = {"wide": (6, 40), "tall": (50, 4), "kernel": (8, 3, 3, 3), "bias": (8,), "zero": (3, 5)}
    made = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    nn.init.zeros_(made["zero"])
    return made


def graded(found: dict[str, nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in found.values():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_step_moves_each_matrix_by_its_share_of_the_norm_whatever_the_scale(scale: float) -> None:
    found = weights()
    with torch.no_grad():
        for weight in found.values():
            weight.mul_(scale)
    before = {name: weight.detach().clone() for name, weight in found.items()}
    graded(found)
    Optimizer(found, 0.01)  # forgets old gradients
    assert all(weight.grad is None for weight in found.values())
    own = Optimizer(found, 0.01)
    graded(found)
    own.step(0.5)
    for name in ("wide", "tall", "kernel"):
        moved = (found[name] - before[name]).norm() / before[name].norm()
        assert 0.6 * 0.005 < moved < 1.2 * 0.005  # Newton-Schulz leaves singular values between 0.7 and 1.2
    torch.testing.assert_close((found["bias"] - before["bias"]).abs(), torch.full((8,), 0.0005), rtol=0.05, atol=0)
    assert not found["zero"].any()


def test_a_small_component_moves_as_far_as_a_large_one() -> None:
    Q = torch.linalg.qr(torch.randn(6, 6)).Q
    weight = nn.Parameter(torch.randn(6, 6))
    before = weight.detach().clone()
    own = Optimizer({"weight": weight}, 0.01)
    weight.grad = Q @ torch.diag(torch.tensor([100.0, 30.0, 10.0, 10.0, 10.0, 10.0])) @ Q.T
    own.step(1.0)
    along = (Q.T @ (before - weight.detach()) @ Q).diag()
    assert along.min() > 0.5 * along.max()


def test_steps_are_taken_up_by_another_optimizer() -> None:
    def after(steps: range, own: Optimizer, found: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        for step in steps:
            graded(found, step)
            own.step(1 / (step + 1))
        return own.state()

    whole = weights()
    parts, again = copy.deepcopy(whole), copy.deepcopy(whole)
    wanted = after(range(6), Optimizer(whole, 0.01), whole)
    state = after(range(3), Optimizer(parts, 0.01), parts)
    own = Optimizer(again, 0.01)
    own.load({key: value.clone() for key, value in state.items()})
    got = after(range(3, 6), own, again)
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
