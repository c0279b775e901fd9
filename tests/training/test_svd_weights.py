"""Factors that train: unfolding and folding keep the function, cutting keeps the optimizer's memory of what is left."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.decomposers.matrix import from_matrix, to_matrix
from spectrim.decomposers.svd import SVD
from spectrim.factored import linalg
from spectrim.factored.dense import DenseLayer
from spectrim.training import svd_weights

VIEWS: Any = ("channel", "spatial")
LAYERS = [
    nn.Linear(7, 5),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False),
    nn.Conv2d(6, 8, 3, dilation=2, groups=2, padding=2, padding_mode="circular"),
]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return copy.deepcopy(request.param)


def inputs_of(layer: nn.Module) -> Tensor:
    return torch.randn(4, 7) if isinstance(layer, nn.Linear) else torch.randn(4, layer.in_channels, 9, 8)  # type: ignore


def unfolded(layer: Any, view: Any) -> Any:
    torch.manual_seed(0)
    layer.reset_parameters()
    svd_weights.unfold(layer, SVD(view).spectrum(layer))
    return layer


def trained(layer: Any, steps: int = 3) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(inputs_of(layer)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("view", VIEWS)
def test_from_matrix_is_the_inverse_of_to_matrix(layer: Any, view: Any) -> None:
    assert torch.equal(
        from_matrix(to_matrix(layer.weight, DenseLayer.of(layer), view), DenseLayer.of(layer), view), layer.weight
    )


@pytest.mark.parametrize("view", VIEWS)
def test_unfolding_and_folding_keep_the_function(layer: Any, view: Any) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    x = inputs_of(layer)
    dense = layer(x).detach()
    names = {name for name, _ in layer.named_parameters()}
    unfolded(layer, view)
    torch.testing.assert_close(layer(x), dense)
    assert set(svd_weights.factor_names("")) <= {f".{name}" for name, _ in layer.named_parameters()}
    svd_weights.fold(layer)
    torch.testing.assert_close(layer(x), dense)
    assert {name for name, _ in layer.named_parameters()} == names and layer.weight.requires_grad


@pytest.mark.parametrize("view", VIEWS)
def test_orthogonalising_keeps_function_and_velocity(layer: Any, view: Any) -> None:
    optimizer = trained(unfolded(layer, view))
    x, parts = inputs_of(layer), svd_weights.svd_of(layer)
    velocity = linalg.SVD(*(optimizer.state[part]["momentum_buffer"].clone() for part in parts))
    before, weight = linalg.SVD(*(part.detach().clone() for part in parts)), layer.weight.detach().clone()
    svd_weights.orthogonalise(layer, optimizer)
    torch.testing.assert_close(layer.weight, weight, atol=1e-6, rtol=1e-5)
    assert (svd_weights.svd_of(layer).S_R.diff(dim=-1) <= 0).all()
    carried = linalg.carried(velocity, before, linalg.orthogonalised(before))
    for part, expected in zip(parts, carried, strict=True):
        torch.testing.assert_close(optimizer.state[part]["momentum_buffer"], expected.float())
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("view", VIEWS)
def test_a_cut_keeps_the_leading_components_and_their_momentum_and_goes_on_training(layer: Any, view: Any) -> None:
    optimizer = trained(unfolded(layer, view))
    svd_weights.orthogonalise(layer, optimizer)
    parts = svd_weights.svd_of(layer)
    momenta = [optimizer.state[part]["momentum_buffer"].clone() for part in parts]
    U, S, Vh = (part.detach().clone() for part in parts)
    svd_weights.truncate(layer, 2, optimizer)
    for part, expected in zip(parts, (U[..., :2], S[..., :2], Vh[..., :2, :]), strict=True):
        assert torch.equal(part, expected)
    for part, momentum in zip(parts, (momenta[0][..., :2], momenta[1][..., :2], momenta[2][..., :2, :]), strict=True):
        assert torch.equal(optimizer.state[part]["momentum_buffer"], momentum)
    before = parts.U_OR.detach().clone()
    optimizer.zero_grad()
    layer(inputs_of(layer)).square().mean().backward()
    optimizer.step()
    assert parts.U_OR.shape == before.shape and not torch.equal(parts.U_OR, before)
    svd_weights.fold(layer)
    assert int(torch.linalg.matrix_rank(to_matrix(layer.weight.detach(), DenseLayer.of(layer), view)).max()) == 2


def test_a_cut_before_the_first_step_needs_no_momentum() -> None:
    layer = unfolded(nn.Linear(7, 5), "channel")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    svd_weights.orthogonalise(layer, optimizer)
    svd_weights.truncate(layer, 1, optimizer)
    assert not any(optimizer.state.values()) and svd_weights.svd_of(layer).S_R.shape == (1, 1)


def test_no_bounded_step_on_a_factor_moves_the_weight_further_than_its_own_gradient() -> None:
    """Of a linear loss <W, G>, at factors far from orthonormal: the step of each factor alone, against lr |G|."""
    torch.manual_seed(0)
    layer = unfolded(nn.Linear(7, 5), "channel")
    svd_weights.bound_steps(layer)
    parts = svd_weights.svd_of(layer)
    with torch.no_grad():
        for part, scale in zip(parts, (3.0, 0.5, 4.0), strict=True):
            part.mul_(scale)
    G_OI, lr = torch.randn(5, 7), 1e-3
    (layer.weight * G_OI).sum().backward()
    before = layer.weight.detach().clone()
    for part in parts:
        kept = part.detach().clone()
        with torch.no_grad():
            part.sub_(lr * part.grad)
            # R components, each moved no further than G's part there, which is no longer than G.
            assert (layer.weight - before).norm() <= lr * G_OI.norm() * len(parts.S_R.flatten()) ** 0.5 + 1e-6
            part.copy_(kept)


def test_orthonormal_factors_with_small_singular_values_are_left_alone() -> None:
    layer = unfolded(nn.Linear(7, 5), "channel")
    with torch.no_grad():
        svd_weights.svd_of(layer).S_R.mul_(0.5 / svd_weights.svd_of(layer).S_R.max())
    other = copy.deepcopy(layer)
    svd_weights.bound_steps(layer)
    G_OI = torch.randn(5, 7)
    for one in (layer, other):
        (one.weight * G_OI).sum().backward()
    for mine, theirs in zip(svd_weights.svd_of(layer), svd_weights.svd_of(other), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
