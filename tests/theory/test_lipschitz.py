"""No pair of inputs is ever driven further apart than a constant says, and the constants are not larger than needed."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectrim.decomposers.matrix import to_matrix
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.dense import DenseLayer
from spectrim.theory.lipschitz import convolution_gain, lipschitz, overlap

many = settings(max_examples=60, deadline=None)
VIEWS: Any = st.sampled_from(["channel", "spatial"])
ACTIVATIONS = [
    nn.Identity(),
    nn.ReLU(),
    nn.ReLU6(),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(-1.7),
    nn.PReLU(3, init=-2.0),
    nn.ELU(0.4),
    nn.ELU(2.5),
    nn.SELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Tanh(),
    nn.Softsign(),
    nn.Sigmoid(),
    nn.Hardsigmoid(),
    nn.LogSigmoid(),
    nn.Softplus(beta=3.0),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_is_as_steep_as_its_constant_and_no_steeper(activation: nn.Module) -> None:
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64).view(1, 1, -1).expand(1, 3, -1).requires_grad_()
    (slope,) = torch.autograd.grad(activation.double()(x).sum(), x)
    steepest = slope.abs().max().item()
    assert steepest <= lipschitz(activation) * (1 + 1e-7)  # torch has 1/6, of Hardsigmoid, in single precision
    assert steepest == pytest.approx(lipschitz(activation), rel=1e-3)


@pytest.mark.parametrize(("module", "peak"), [(nn.GELU(), math.sqrt(2)), (nn.SiLU(), 2.39936), (nn.Mish(), 1.49057)])
def test_a_constant_found_numerically_is_a_bound_to_nine_digits(module: nn.Module, peak: float) -> None:
    x = torch.linspace(peak - 1e-3, peak + 1e-3, 200_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    assert 0 <= lipschitz(module) - slope.max().item() < 1.1e-9


def test_a_module_without_a_constant_is_named() -> None:
    class Steeper(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * x

    for module in (nn.BatchNorm2d(3), nn.Softmax(1), Steeper()):
        with pytest.raises(UserError, match=f"no Lipschitz constant is known for {type(module).__name__}"):
            lipschitz(module)


@many
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(8, 24))
def test_overlap_counts_the_windows_over_one_input(kernel: int, stride: int, dilation: int, length: int) -> None:
    length += (kernel - 1) * dilation
    starts = range(0, length - (kernel - 1) * dilation, stride)
    read = [start + offset * dilation for start in starts for offset in range(kernel)]
    most = max(read.count(place) for place in set(read))
    assert most <= overlap(kernel, stride, dilation) <= kernel


def test_overlap_is_reached_on_a_long_input() -> None:
    for kernel in range(1, 6):
        for stride in range(1, 5):
            for dilation in range(1, 4):
                read = [start + offset * dilation for start in range(0, 200, stride) for offset in range(kernel)]
                assert max(map(read.count, set(read))) == overlap(kernel, stride, dilation)


def norm_of(layer: nn.Module, side: tuple[int, int], channels: int) -> float:
    """The largest singular value of a linear map of images, from its whole matrix."""
    basis = torch.eye(channels * side[0] * side[1], dtype=torch.float64).view(-1, channels, *side)
    return float(torch.linalg.matrix_norm(layer(basis).flatten(1), ord=2))


convolutions = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "groups": st.sampled_from([1, 2]),
    }
)


@many
@given(convolutions, VIEWS, st.integers(0, 2**31))
def test_no_convolution_exceeds_its_gain(shape: dict, view: Any, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 2, bias=False, **shape).double().requires_grad_(False)
    sigma = linalg.svd(to_matrix(layer.weight, DenseLayer.of(layer), view)).S_R.max().item()
    norm = norm_of(layer, (7, 8), 4)
    kh, kw = shape["kernel_size"]
    assert norm <= convolution_gain(layer, view) * sigma * (1 + 1e-9)
    assert convolution_gain(layer, view) <= math.sqrt(kh * kw) + 1e-12  # S2's extension, at any stride and zero padding


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_the_gain_is_reached_by_a_box_filter_and_without_it_the_bound_fails(view: Any) -> None:
    layer = nn.Conv2d(1, 1, 3, padding="same", bias=False).double().requires_grad_(False)
    layer.weight.fill_(1)
    sigma = linalg.svd(to_matrix(layer.weight, DenseLayer.of(layer), view)).S_R.max().item()
    norm = norm_of(layer, (24, 24), 1)
    assert 2.9 * sigma < norm <= convolution_gain(layer, view) * sigma == pytest.approx(3 * sigma)


def test_padding_that_repeats_inputs_is_refused_and_rightly() -> None:
    layer = nn.Conv2d(1, 1, 1, padding=3, padding_mode="replicate", bias=False).double().requires_grad_(False)
    assert norm_of(layer, (2, 2), 1) > float(layer.weight.abs())  # gain 1 would be too little
    with pytest.raises(UserError, match="padding_mode=replicate repeats inputs"):
        convolution_gain(layer, "channel")


pools = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(2, 4), st.integers(2, 4)),
        "stride": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "padding": st.tuples(st.integers(0, 1), st.integers(0, 1)),
        "ceil_mode": st.booleans(),
    }
)


@many
@given(pools, st.booleans(), st.sampled_from([None, 1, 3]))
def test_no_average_pooling_exceeds_its_constant(shape: dict, count_include_pad: bool, divisor: int | None) -> None:
    pool = nn.AvgPool2d(**shape, count_include_pad=count_include_pad, divisor_override=divisor)
    assert norm_of(pool, (6, 7), 1) <= lipschitz(pool) * (1 + 1e-9)


@many
@given(pools, st.integers(1, 2), st.integers(0, 2**31))
def test_no_max_pooling_exceeds_its_constant(shape: dict, dilation: int, seed: int) -> None:
    pool = nn.MaxPool2d(**shape, dilation=dilation)
    x, step = drawn(50, 1, 9, 9, seed=seed), drawn(50, 1, 9, 9, seed=seed + 1)
    step = torch.where(torch.rand(step.shape, generator=torch.Generator().manual_seed(seed)) < 0.1, 5 * step, 0)
    moved = (pool(x + step) - pool(x)).flatten(1).norm(dim=1)
    assert (moved <= lipschitz(pool) * step.flatten(1).norm(dim=1) + 1e-12).all()


def test_one_peak_under_overlapping_windows_reaches_the_constant_of_max_pooling() -> None:
    peak = F.pad(torch.ones(1, 1, 1, 1), (3, 3, 3, 3))
    assert nn.MaxPool2d(3, 1)(peak).norm().item() == pytest.approx(lipschitz(nn.MaxPool2d(3, 1))) == 3
    assert lipschitz(nn.MaxPool2d(2)) == 1 and lipschitz(nn.AvgPool2d(2)) == 0.5


def test_max_pooling_that_returns_indices_is_refused() -> None:
    with pytest.raises(UserError, match="returns its indices"):
        lipschitz(nn.MaxPool2d(2, return_indices=True))
