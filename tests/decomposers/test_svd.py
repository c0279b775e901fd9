"""Every rank of a layer from one SVD: curves, costs and factors agree with the factored weight itself."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from spectrim.decomposers.spectrum import Spectrum, spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError

VIEWS = ("channel", "spatial")


def linear() -> nn.Module:
    return nn.Linear(7, 5)


def grouped() -> nn.Module:
    return nn.Conv2d(6, 8, (3, 2), groups=2)


def tall() -> nn.Module:
    return nn.Conv2d(2, 9, (2, 3), bias=False)


LAYERS = [linear, grouped, tall]


def spectra() -> list[Any]:
    return [pytest.param(layer, view, id=f"{layer.__name__}-{view}") for layer in LAYERS for view in VIEWS]


@pytest.mark.parametrize(("make", "view"), spectra())
def test_curves_equal_the_factored_weight_at_every_rank(make: Any, view: Any, weight_of: Any) -> None:
    layer = make().double()
    groups = getattr(layer, "groups", 1)
    spectrum, G = SVD(view).spectrum(layer), torch.randn_like(layer.weight)
    for k in range(1, spectrum.max_rank + 1):
        change = weight_of(spectrum.factor(k), groups) - layer.weight
        torch.testing.assert_close(spectrum.error()[k], change.norm(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(
            spectrum.relative_error()[k], change.norm() / layer.weight.norm(), atol=1e-12, rtol=1e-9
        )
        torch.testing.assert_close(spectrum.largest_entry()[k], change.abs().max(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(spectrum.first_order(G)[k], (G * change).sum(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(spectrum.error()[0], layer.weight.norm())
    torch.testing.assert_close(spectrum.first_order(G)[0], -(G * layer.weight).sum())
    for curve in (spectrum.error(), spectrum.largest_entry(), spectrum.first_order(G)):
        assert curve.shape == (spectrum.max_rank + 1,) and curve.dtype == torch.float64


@pytest.mark.parametrize(("make", "view"), spectra())
def test_cost_and_break_even_count_the_parameters(make: Any, view: Any) -> None:
    layer = make()
    spectrum = SVD(view).spectrum(layer)
    saving = []
    for k in range(1, spectrum.max_rank + 1):
        factored = spectrum.factor(k)
        assert spectrum.cost(k) == factored.first.weight.numel() + factored.second.weight.numel()
        saving += [k] if spectrum.cost(k) < layer.weight.numel() else []
    assert spectrum.break_even == max(saving, default=0)


def convolutions() -> list[Any]:
    geometry = [  # kernel, stride, padding, dilation
        ((3, 3), 1, 1, 1),
        ((3, 2), 1, "same", 1),
        ((2, 5), 1, "same", (2, 1)),
        ((3, 5), 2, (2, 1), 1),
        ((1, 3), (2, 1), (0, 1), (1, 2)),
        ((3, 1), (1, 3), "valid", 2),
        ((4, 2), (3, 2), 2, (1, 3)),
        ((1, 1), 2, 0, 1),
    ]
    modes = ("zeros", "reflect", "replicate", "circular")
    return list(itertools.product(geometry, modes, (1, 2), VIEWS))


@pytest.mark.parametrize(("geometry", "mode", "groups", "view"), convolutions())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_full_rank_reproduces_the_dense_convolution(geometry: Any, mode: Any, groups: int, view: Any) -> None:
    kernel, stride, padding, dilation = geometry
    dense = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, groups == 1, mode)
    x = torch.randn(2, 4, 11, 12)
    spectrum = SVD(view).spectrum(dense)
    expected = dense(x)
    got = spectrum.factor(spectrum.max_rank)(x)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(VIEWS),
)
def test_full_rank_reproduces_convolutions_of_any_shape(
    groups: int, outputs: int, inputs: int, kernel: tuple[int, int], view: Any
) -> None:
    dense = nn.Conv2d(groups * inputs, groups * outputs, kernel, groups=groups)
    x = torch.randn(2, groups * inputs, 5, 6)
    spectrum = SVD(view).spectrum(dense)
    torch.testing.assert_close(spectrum.factor(spectrum.max_rank)(x), dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_full_rank_reproduces_the_dense_linear_layer(precision: Any) -> None:
    dense, x = nn.Linear(31, 17), torch.randn(4, 3, 31)
    spectrum = SVD(precision=precision).spectrum(dense)
    assert (spectrum.factor(17)(x) - dense(x)).norm() <= 1e-5 * dense(x).norm()


@pytest.mark.parametrize(("make", "view"), spectra())
def test_components_may_be_chosen_by_index(make: Any, view: Any, weight_of: Any) -> None:
    layer = make().double()
    groups = getattr(layer, "groups", 1)
    spectrum = SVD(view).spectrum(layer)
    full = spectrum.max_rank
    torch.testing.assert_close(weight_of(spectrum.factor((2, 0, 1)), groups), weight_of(spectrum.factor(3), groups))
    odd, even = (weight_of(spectrum.factor(range(start, full, 2)), groups) for start in (1, 0))
    torch.testing.assert_close(odd + even, layer.weight)


@pytest.mark.parametrize("keep", [0, -1, 6, (), (0, 0), (0, 5), (-1, 2)])
def test_components_that_are_not_there_are_refused(keep: Any) -> None:
    with pytest.raises(UserError, match="keep between 1 and 5 components"):
        SVD().spectrum(nn.Linear(7, 5)).factor(keep)


def test_a_depthwise_convolution_saves_at_no_rank() -> None:
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert SVD("channel").spectrum(depthwise).break_even == 0


def test_a_zero_weight_is_factored_to_zero() -> None:
    layer = nn.Linear(6, 6)
    nn.init.zeros_(layer.weight)
    spectrum = SVD().spectrum(layer)
    assert not spectrum.relative_error().any()
    torch.testing.assert_close(spectrum.factor(1)(torch.randn(3, 6)), layer.bias.expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_have_the_precision_of_the_layer(dtype: torch.dtype, weight_of: Any) -> None:
    layer = nn.Linear(8, 8).to(dtype)
    factored = SVD().spectrum(layer).factor(8)
    assert {p.dtype for p in factored.parameters()} == {dtype}
    error = (weight_of(factored, 1) - layer.weight).float().norm() / layer.weight.float().norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_the_bias_is_carried_over_and_not_shared() -> None:
    layer = nn.Conv2d(4, 4, 3)
    factored = SVD("spatial").spectrum(layer).factor(2)
    assert torch.equal(factored.second.bias, layer.bias) and factored.first.bias is None
    assert factored.second.bias.data_ptr() != layer.bias.data_ptr()


@pytest.mark.parametrize("settings", [{"view": "diagonal"}, {"precision": "float8"}, {"view": 3}])
def test_unknown_settings_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match=r"SVD: \w+="):
        SVD(**settings)


def test_only_linear_and_two_dimensional_convolution_are_taken() -> None:
    with pytest.raises(UserError, match="not a Conv1d"):
        SVD().spectrum(nn.Conv1d(3, 3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        SVD().spectrum(layer)


class TestMemory:
    """A layer is decomposed once for each decomposer, and anew when it changes."""

    def test_the_same_spectrum_is_given_again(self) -> None:
        layer = nn.Linear(6, 6)
        assert spectrum_of(layer, SVD()) is spectrum_of(layer, SVD())
        assert spectrum_of(layer, SVD()) is not spectrum_of(layer, SVD("spatial"))

    @pytest.mark.parametrize("part", ["weight", "bias"])
    @pytest.mark.parametrize("way", ["in place", "through data", "replaced"])
    def test_a_changed_layer_is_decomposed_anew(self, part: str, way: str) -> None:
        layer = nn.Linear(6, 6)
        before: Spectrum = spectrum_of(layer, SVD())
        parameter = getattr(layer, part)
        if way == "in place":
            with torch.no_grad():
                parameter.mul_(2)
        elif way == "through data":
            parameter.data.mul_(2)
        else:
            setattr(layer, part, nn.Parameter(2 * parameter.detach()))
        x = torch.randn(3, 6)
        assert spectrum_of(layer, SVD()) is not before
        torch.testing.assert_close(spectrum_of(layer, SVD()).factor(6)(x), layer(x))

    def test_a_spectrum_does_not_keep_its_layer_alive(self) -> None:
        layer = nn.Linear(6, 6)
        spectrum = spectrum_of(layer, SVD())
        reference = weakref.ref(layer)
        del layer
        gc.collect()
        assert reference() is None and spectrum.max_rank == 6
