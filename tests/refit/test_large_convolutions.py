"""The fast fit of a large convolution ends in the minimum that LBFGS comes to in hundreds of steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.factored.layers import FactoredConv2d, pivoted_like
from spectrim.refit import factors, large_convolutions
from spectrim.refit.large_convolutions import fitted
from spectrim.refit.moments import Moments

VIEWS = ["channel", "spatial", "vertical"]
KERNELS = [(3, 3), (2, 3)]


def problem(view: str, groups: int, kernel: tuple[int, int], rank: int = 3) -> tuple[FactoredConv2d, Tensor, Tensor]:
    """A factored convolution, the second moments of inputs that are nearly alike, and those with wanted outputs."""
    dense = nn.Conv2d(6, 8, kernel, groups=groups, bias=False)
    layer = FactoredConv2d.shaped_like(dense, rank, view)
    layer.fill([torch.randn(factor.weight.shape) for factor in layer.factors], None)
    inputs = dense.weight[0].numel()
    x = torch.randn(groups, 400, inputs).double() @ torch.randn(groups, inputs, inputs).double()
    y = x @ torch.randn(groups, inputs, 8 // groups).double() + torch.randn(groups, 400, 8 // groups)
    xx = x.mT @ x / 400
    return layer, xx + 1e-3 * xx.diagonal(dim1=1, dim2=2).mean() * torch.eye(inputs), y.mT @ x / 400


def best_fit(layer: FactoredConv2d, weights: list[Tensor], xx: Tensor, yx: Tensor) -> list[Tensor]:
    return fitted(layer, weights, xx, torch.linalg.cholesky(xx), yx)


def weights_of(layer: FactoredConv2d) -> list[Tensor]:
    return [factor.weight.detach().double() for factor in layer.factors]


def error(layer: FactoredConv2d, weights: list[Tensor], xx: Tensor, yx: Tensor) -> float:
    """Above that of the best W of any rank, as a part of what the best W explains."""
    W, best = layer.product(weights), torch.linalg.solve(xx, yx.mT).mT
    return float((((W - best) @ xx) * (W - best)).sum() / (best * yx).sum())


def by_many_steps(layer: FactoredConv2d, weights: list[Tensor], xx: Tensor, yx: Tensor) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "ITERATIONS", 500)
        return factors._by_gradient(
            layer, [weight.clone(memory_format=torch.contiguous_format) for weight in weights], xx, yx
        )


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_no_step_from_the_minimum_makes_it_better(
    view: str, groups: int, kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, xx, yx = problem(view, groups, kernel)
    roughly = error(layer, best_fit(layer, weights_of(layer), xx, yx), xx, yx)
    monkeypatch.setattr(large_convolutions, "TOLERANCE", 0.0)
    monkeypatch.setattr(large_convolutions, "ITERATIONS", 2000)
    found = best_fit(layer, weights_of(layer), xx, yx)
    least = error(layer, found, xx, yx)
    assert least == pytest.approx(error(layer, by_many_steps(layer, found, xx, yx), xx, yx), abs=1e-6)
    assert -1e-12 < least <= roughly < error(layer, weights_of(layer), xx, yx)
    assert roughly < least + 0.02


@pytest.mark.parametrize("groups", [1, 2])
def test_in_the_channel_view_it_is_the_least_error_of_all(groups: int) -> None:
    layer, xx, yx = problem("channel", groups, (3, 3))
    best = torch.linalg.solve(xx, yx.mT).mT
    energies = torch.linalg.eigvalsh(best @ xx @ best.mT)  # Eckart and Young, in the norm of the outputs
    expected = float(energies[:, : -layer.rank].sum() / energies.sum())
    found = best_fit(layer, weights_of(layer), xx, yx)
    assert error(layer, found, xx, yx) == pytest.approx(expected, rel=1e-9)
    many = error(layer, by_many_steps(layer, weights_of(layer), xx, yx), xx, yx)
    assert expected <= many * (1 + 1e-9)


@pytest.mark.parametrize("view", VIEWS)
def test_what_factors_of_the_rank_compute_is_found(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_convolutions, "TOLERANCE", 0.0)
    layer, xx, _ = problem(view, 1, (3, 3))
    wanted = weights_of(layer)
    yx = layer.product(wanted) @ xx
    near = [weight + 0.1 * torch.randn_like(weight) for weight in wanted]
    assert error(layer, near, xx, yx) > 1e-3
    assert error(layer, best_fit(layer, near, xx, yx), xx, yx) < 1e-7


@pytest.mark.parametrize("view", VIEWS)
def test_components_and_outputs_without_any_weight_do_no_harm(view: str) -> None:
    layer, xx, yx = problem(view, 1, (3, 3))
    weights = weights_of(layer)
    weights[0][1], weights[1][:, 1] = 0.0, 0.0
    assert error(layer, best_fit(layer, weights, xx, yx), xx, yx) < error(layer, weights, xx, yx)
    nothing = layer.product(best_fit(layer, weights, xx, torch.zeros_like(yx)))
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))


def moments_of(xx: Tensor, yx: Tensor) -> Any:
    return Moments(xx, yx, torch.zeros_like(xx[..., 0]), torch.zeros_like(yx[..., 0]))


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_large_layers_alone_are_fitted_so(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, xx, yx = problem(view, 1, (3, 3))
    start, entries = weights_of(layer), yx.numel()
    slow = factors._fit(layer, moments_of(xx, yx))
    monkeypatch.setattr(large_convolutions, "LARGE", entries)
    layer.fill(start, None)
    fast = factors._fit(layer, moments_of(xx, yx))
    assert not torch.equal(fast, slow)
    torch.testing.assert_close(layer.product(weights_of(layer)), fast, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(large_convolutions, "LARGE", entries + 1)
    layer.fill(start, None)
    assert torch.equal(factors._fit(layer, moments_of(xx, yx)), slow)


def test_the_published_numbers_come_from_lbfgs() -> None:
    assert large_convolutions.LARGE > 256 * 256 * 9  # the largest convolution that a table refits


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_pivoted_factors_are_fitted_as_plain_ones(view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_convolutions, "LARGE", 1)
    layer, xx, yx = problem(view, 1, (3, 3))
    dense = nn.Conv2d(6, 8, 3, bias=False)
    pivoted = pivoted_like(FactoredConv2d.shaped_like(dense, 3, view), 3)
    pivoted.fill_plain(weights_of(layer))
    expected = factors._fit(layer, moments_of(xx, yx))
    torch.testing.assert_close(factors._fit(pivoted, moments_of(xx, yx)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pivoted.weight.double().flatten(1), expected[0], rtol=1e-3, atol=1e-3)


def test_subspaces_and_singular_moments_are_left_to_lbfgs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_convolutions, "LARGE", 1)
    layer, xx, yx = problem("spatial", 1, (3, 3))
    parts: Any = SubspaceSVD(2).spectrum(nn.Conv2d(6, 8, 3)).factor(2)
    monkeypatch.setattr(factors, "fitted", lambda *_: pytest.fail("subspaces"))
    factors._fit(parts, moments_of(xx, yx))

    def singular(*_: Any) -> Any:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(factors, "fitted", singular)
    before = error(layer, weights_of(layer), xx, yx)
    factors._fit(layer, moments_of(xx, yx))
    assert error(layer, weights_of(layer), xx, yx) < before
