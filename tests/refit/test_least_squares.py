"""The fit by the loss is converged, knows no unit, and ends where LBFGS comes to in hundreds of steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.factored.layers import FactoredConv2d, pivoted_like
from spectrim.refit import factors, least_squares, variable_projection
from spectrim.refit.least_squares import by_steps, fitted
from spectrim.refit.moments import Moments

VIEWS = ["channel", "spatial", "vertical"]
KERNELS = [(3, 3), (2, 3)]
FORMS: dict[str, Any] = {
    "channel": SVD("channel"),
    "spatial": SVD("spatial"),
    "subspaces": SubspaceSVD(2, "channel"),
    "pivoted channel": SVD("channel", factors="pivoted"),
    "pivoted spatial": SVD("spatial", factors="pivoted"),
    "tucker": Tucker2(),
}


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
    given = [weight.clone(memory_format=torch.contiguous_format) for weight in weights]
    return by_steps(layer, given, xx, yx, 500)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_no_step_from_the_minimum_makes_it_better(
    view: str, groups: int, kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, xx, yx = problem(view, groups, kernel)
    found = best_fit(layer, weights_of(layer), xx, yx)
    least = error(layer, found, xx, yx)
    assert least == pytest.approx(error(layer, by_many_steps(layer, found, xx, yx), xx, yx), abs=2e-5)
    monkeypatch.setattr(variable_projection, "LARGE", 1)
    roughly = error(layer, best_fit(layer, weights_of(layer), xx, yx), xx, yx)
    assert -1e-12 < least <= roughly + 1e-5
    assert roughly < error(layer, weights_of(layer), xx, yx) and roughly < least + 0.02


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
    monkeypatch.setattr(variable_projection, "TOLERANCE", 0.0)
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


def uneven(groups: int, outputs: int) -> Tensor:
    """Return weights of outputs that differ by orders of magnitude, as those of trained networks do."""
    root = torch.randn(groups, outputs, outputs).double() * torch.logspace(0, -3, outputs).double()
    return root @ root.mT


def moments_of(xx: Tensor, yx: Tensor) -> Any:
    return Moments(1, xx, yx, torch.zeros_like(xx[..., 0]), torch.zeros_like(yx[..., 0]))


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_of_fits_by_the_outputs_those_of_large_layers_alone_are_fast(
    view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, xx, yx = problem(view, 1, (3, 3))
    start, entries = weights_of(layer), yx.numel()
    slow = factors._fit(layer, moments_of(xx, yx))
    monkeypatch.setattr(factors, "LARGE", entries)
    layer.fill(start, None)
    fast = factors._fit(layer, moments_of(xx, yx))
    assert not torch.equal(fast, slow)
    torch.testing.assert_close(layer.product(weights_of(layer)), fast, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(factors, "LARGE", entries + 1)
    layer.fill(start, None)
    assert torch.equal(factors._fit(layer, moments_of(xx, yx)), slow)


def test_the_published_numbers_by_the_outputs_come_from_lbfgs() -> None:
    assert factors.LARGE > 256 * 256 * 9  # the largest convolution that a table refits


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_pivoted_factors_are_fitted_as_plain_ones(view: str) -> None:
    layer, xx, yx = problem(view, 1, (3, 3))
    dense = nn.Conv2d(6, 8, 3, bias=False)
    pivoted = pivoted_like(FactoredConv2d.shaped_like(dense, 3, view), 3)
    pivoted.fill_plain(weights_of(layer))
    G = uneven(1, 8)
    expected = factors._fit(layer, moments_of(xx, yx), G)
    torch.testing.assert_close(factors._fit(pivoted, moments_of(xx, yx), G), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pivoted.weight.double().flatten(1), expected[0], rtol=1e-3, atol=1e-3)


def test_subspaces_and_singular_moments_are_left_to_lbfgs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, xx, yx = problem("spatial", 1, (3, 3))
    parts: Any = SubspaceSVD(2).spectrum(nn.Conv2d(6, 8, 3)).factor(2)
    calls = []

    def singular(*_: Any) -> Any:
        calls.append(1)
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(least_squares, "_of_two", singular)
    for each, expected in ((parts, 0), (layer, 1)):
        before = error(each, weights_of(each), xx, yx)
        factors._fit(each, moments_of(xx, yx), torch.eye(8).double()[None])
        assert error(each, weights_of(each), xx, yx) < before
        assert len(calls) == expected


UNITS = [(2.0**-20, 1, 1), (2.0**20, 1, 1), (1, 2.0**-12, 1), (1, 1, 2.0**14), (2.0**30, 2.0**9, 2.0**-9)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("decomposer", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("units", UNITS, ids=str)
def test_a_fit_by_the_loss_knows_no_unit(decomposer: Any, groups: int, units: tuple[float, float, float]) -> None:
    """Neither of the loss, nor of inputs, nor of outputs."""
    of_G, of_x, of_y = units
    layer: Any = decomposer.spectrum(nn.Conv2d(4, 8, 3, groups=groups)).factor(2)
    rescaled, kept = copy.deepcopy(layer), layer.plain([factor.weight.detach() for factor in layer.factors])
    rescaled.fill_plain([*kept[:-1], kept[-1] * of_y / of_x])
    inputs, outputs = 36 // groups, 8 // groups
    x = torch.randn(groups, 100, inputs).double()
    xx, yx, G = x.mT @ x / 100, torch.randn(groups, outputs, 100).double() @ x / 100, uneven(groups, outputs)
    expected = factors._fit(layer, moments_of(xx, yx), G) * of_y / of_x
    found = factors._fit(rescaled, moments_of(of_x**2 * xx, of_x * of_y * yx), of_G * G)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("groups", [1, 2])
def test_dead_inputs_and_groups_that_the_loss_does_not_feel_do_no_harm(view: str, groups: int, rank: int) -> None:
    """Moments of a low rank, of inputs that are always zero, and weights of outputs that are."""
    layer, _, _ = problem(view, groups, (3, 3), rank)
    x = torch.randn(groups, 5, 6 // groups * 9).double()
    x[:, :, ::4] = 0.0
    x[0], G = 0.0, uneven(groups, 8 // groups)
    G[-1] = 0.0
    start = layer.product(weights_of(layer))
    found = factors._fit(layer, moments_of(x.mT @ x, torch.randn(groups, 8 // groups, 5).double() @ x), G)
    assert found.isfinite().all() and all(weight.isfinite().all() for weight in weights_of(layer))
    if groups > 1:  # nothing flows into the first group, whose weight has the rank already
        torch.testing.assert_close(found[0], start[0], rtol=1e-3, atol=1e-3)
