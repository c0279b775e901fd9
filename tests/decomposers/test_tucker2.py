"""Tucker-2: every rank of its schedule from one decomposition, and the form between three convolutions."""

from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2, Tucker2Spectrum, higher_order_svd
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm, TuckerForm


def spectrum_of(layer: nn.Module) -> Tucker2Spectrum:
    spectrum = Tucker2().spectrum(layer)
    assert isinstance(spectrum, Tucker2Spectrum)
    return spectrum


def square() -> nn.Conv2d:
    return nn.Conv2d(6, 5, 3)


def grouped() -> nn.Conv2d:
    return nn.Conv2d(6, 8, (3, 2), groups=2)


def tall() -> nn.Conv2d:
    return nn.Conv2d(1, 9, (2, 3), bias=False)  # more outputs than the 6 numbers that each of them weighs


def row() -> nn.Conv2d:
    return nn.Conv2d(4, 3, (1, 3))


LAYERS = [square, grouped, tall, row]


@pytest.mark.parametrize("make", LAYERS)
def test_curves_equal_the_factored_weight_at_every_rank(make: Any, weight_of: Any) -> None:
    layer = make().double()
    spectrum, G = spectrum_of(layer), torch.randn_like(layer.weight)
    for k in range(1, spectrum.max_rank + 1):
        change = weight_of(spectrum.factor(k), layer.groups) - layer.weight
        torch.testing.assert_close(spectrum.error()[k], change.norm(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(spectrum.largest_entry()[k], change.abs().max(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(spectrum.first_order(G)[k], (G * change).sum(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(spectrum.error()[0], layer.weight.norm())
    torch.testing.assert_close(spectrum.largest_entry()[0], layer.weight.abs().max())
    torch.testing.assert_close(spectrum.first_order(G)[0], -(G * layer.weight).sum())
    for curve in (spectrum.error(), spectrum.largest_entry(), spectrum.first_order(G)):
        assert curve.shape == (spectrum.max_rank + 1,) and curve.dtype == torch.float64


@pytest.mark.parametrize("make", LAYERS)
def test_costs_count_the_parameters_and_rise(make: Any) -> None:
    layer = make()
    spectrum = spectrum_of(layer)
    costs = [0]
    for k in range(1, spectrum.max_rank + 1):
        factored = spectrum.factor(k)
        assert spectrum.sizes(k) == tuple(factor.weight.numel() for factor in factored.children())
        costs.append(spectrum.cost(k))
        assert costs[k] > costs[k - 1]
    assert spectrum.break_even == max(k for k, cost in enumerate(costs) if cost < layer.weight.numel())
    for params in range(costs[-1] + 3):
        assert spectrum.rank_within(params) == max(k for k, cost in enumerate(costs) if cost <= params)


@pytest.mark.parametrize("make", LAYERS)
def test_each_rank_drops_the_side_that_loses_least_for_each_parameter_saved(make: Any) -> None:
    layer = make().double()
    spectrum = spectrum_of(layer)
    C, U, V = spectrum.tucker
    assert spectrum.ranks[1] == (1, 1) and spectrum.ranks[-1] == (U.shape[2], V.shape[2])

    def energy(p: int, q: int) -> float:
        return float(C[:, :p, :q].square().sum())

    def cost(p: int, q: int) -> int:
        return len(C) * (U.shape[1] * p + p * q * C[0, 0, 0].numel() + V.shape[1] * q)

    for k in range(2, spectrum.max_rank + 1):
        p, q = spectrum.ranks[k]
        options = [pair for pair in ((p - 1, q), (p, q - 1)) if min(pair)]
        price = {pair: (energy(p, q) - energy(*pair)) / (cost(p, q) - cost(*pair)) for pair in options}
        assert spectrum.ranks[k - 1] in options
        assert price[spectrum.ranks[k - 1]] == pytest.approx(min(price.values()))


def test_the_bases_are_orthonormal_and_the_core_is_all_orthogonal_with_falling_slices() -> None:
    """The defining properties of a higher-order SVD: the slices' norms are the singular values of the unfoldings."""
    W = torch.randn(5, 4, 3, 2).double()
    C, U, V = higher_order_svd(W)
    torch.testing.assert_close(torch.einsum("pqhw,op,iq->oihw", C, U, V), W)
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double())
    for mode in (0, 1):
        unfolded = C.transpose(0, mode).flatten(1)
        values = torch.linalg.svdvals(W.transpose(0, mode).flatten(1))
        torch.testing.assert_close(unfolded @ unfolded.T, torch.diag(values.square()))


def test_a_weight_of_low_mode_ranks_is_kept_whole_at_those_ranks() -> None:
    layer = nn.Conv2d(8, 9, 3).double()
    with torch.no_grad():
        C, U, V = (torch.randn(*shape).double() for shape in ((3, 2, 3, 3), (9, 3), (8, 2)))
        layer.weight.copy_(torch.einsum("pqhw,op,iq->oihw", C, U, V))
    spectrum = spectrum_of(layer)
    assert spectrum.ranks[4] == (3, 2)
    assert spectrum.error()[4] < 1e-12 * spectrum.error()[0] and spectrum.error()[3] > 1e-3 * spectrum.error()[0]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), 1, 1, 1), ((3, 2), 1, "same", 1), ((3, 5), 2, (2, 1), 1), ((1, 3), (2, 1), (0, 1), (1, 2))],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_full_rank_reproduces_the_dense_convolution(
    kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, mode: Any
) -> None:
    dense = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, groups == 1, mode)
    x = torch.randn(2, 4, 11, 12)
    spectrum = spectrum_of(dense)
    expected = dense(x)
    got = spectrum.factor(spectrum.max_rank)(x)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(7, 5, 1, groups=1)])
def test_what_has_no_kernel_is_left_to_the_plain_svd(layer: Any) -> None:
    mine, plain = Tucker2().spectrum(layer), SVD().spectrum(layer)
    assert mine.kept(1).form == plain.kept(1).form and torch.equal(mine.error(), plain.error())


def test_a_depthwise_convolution_saves_at_no_rank() -> None:
    assert Tucker2().spectrum(nn.Conv2d(8, 8, 3, groups=8)).break_even == 0


def test_a_zero_weight_is_factored_to_zero() -> None:
    layer = square()
    nn.init.zeros_(layer.weight)
    spectrum = spectrum_of(layer)
    assert not spectrum.relative_error().any()
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(spectrum.factor(1)(x), layer(x))


@pytest.mark.parametrize("keep", [(0, 2), (1,), (0, 0)])
def test_chosen_components_are_refused(keep: Any) -> None:
    for cut in (spectrum_of(square()).factor, spectrum_of(square()).kept):
        with pytest.raises(UserError, match="keeps its leading components only"):
            cut(keep)


@pytest.mark.parametrize("keep", [0, -1, 11, ()])
def test_ranks_that_are_not_there_are_refused(keep: Any) -> None:
    with pytest.raises(UserError, match="keep between 1 and 10 components"):
        spectrum_of(square()).factor(keep)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    layer = square()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="a weight holds NaN or infinity"):
        Tucker2().spectrum(layer)


def test_the_backend_that_a_user_of_tensorly_has_set_stays() -> None:
    import tensorly

    assert tensorly.get_backend() == "numpy"
    Tucker2().spectrum(square())
    assert tensorly.get_backend() == "numpy"


def test_a_plan_names_both_ranks(net: nn.Sequential, batches: Any) -> None:
    result = spectrim.compress(
        net, calibration=batches, algorithm=spectrim.Truncation(params_kept=0.6), decomposer=Tucker2()
    )
    assert list(result.plan) == ["0", "3", "6", "8"]
    for name in ("0", "3"):
        layer, kept = result.model.get_submodule(name), result.plan[name]
        groups = layer.second.groups
        p, q = layer.second.out_channels // groups, layer.second.in_channels // groups
        assert (kept.rank, kept.form) == (p + q - 1, TuckerForm(p, q))
    assert result.plan["6"].form == PlainForm("linear")


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (
            spectrim.Joint(params_kept=0.6, samples=16),
            "layer 0: a TuckerConv2d is cut to a rank, its components have no gates",
        ),
        (spectrim.RankSelection(), "layer 0: rank selection needs singular values; Tucker2Spectrum has none"),
    ],
    ids=["joint", "rank_selection"],
)
def test_what_chooses_among_singular_components_says_so_in_one_line(
    algorithm: Any, said: str, net: nn.Sequential, batches: Any
) -> None:
    with pytest.raises(UserError, match=said):
        spectrim.compress(net, calibration=batches, algorithm=algorithm, decomposer=Tucker2())
