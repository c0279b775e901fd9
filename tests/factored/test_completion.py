"""Pivoted layers compute what plain factors do, with fewer numbers, in every precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.batches import evaluating
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 10),
    "wide": lambda: nn.Linear(40, 6, bias=False),
    "tall": lambda: nn.Linear(6, 40),
    "convolution": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(8, 6, (3, 5), padding=1, groups=2),
    "reflected": lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect", bias=False),
    "same": lambda: nn.Conv2d(8, 6, (3, 5), padding="same", dilation=2),
    "embedding": lambda: nn.Embedding(30, 8),
}


def inputs_of(dense: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(dense, nn.Embedding):
        return torch.arange(30).reshape(5, 6)
    return (
        torch.randn(2, 8, 9, 9, dtype=dtype)
        if isinstance(dense, nn.Conv2d)
        else torch.randn(3, 4, dense.in_features, dtype=dtype)
    )


def both(name: str, view: Any, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, nn.Module]:
    """Return the plain and the pivoted layer of one rank, and the dense layer."""
    dense = LAYERS[name]().to(dtype)
    plain, pivoted = (SVD(view, embeddings=True, factors=own).spectrum(dense) for own in ("plain", "pivoted"))
    return plain.factor(rank), pivoted.factor(rank), dense


def parameters(layer: FactoredLayer) -> int:
    return sum(factor.weight.numel() for factor in layer.factors)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_map_is_that_of_plain_factors_with_the_square_of_the_rank_less(name: str, view: str, rank: int) -> None:
    plain, pivoted, dense = both(name, view, rank)
    x = inputs_of(dense)
    with torch.no_grad():
        torch.testing.assert_close(pivoted(x), plain(x), atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(pivoted.weight, plain.weight, atol=3e-6, rtol=1e-5)
    groups = getattr(dense, "groups", 1)
    assert parameters(plain) - parameters(pivoted) == groups * rank**2
    assert all(buffer.dtype == torch.int32 for buffer in pivoted.buffers())


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_inputs_with_channels_last_are_taken_as_others(groups: int, size: int) -> None:
    dense = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    pivoted = SVD("spatial", factors="pivoted").spectrum(dense).factor(2)
    x = torch.randn(4, 8, size, size)
    with torch.no_grad():
        expected = nn.functional.conv2d(x.double(), pivoted.weight.double(), pivoted.bias.double(), 1, 1, 1, groups)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.flatten(2).mT.contiguous().mT.view_as(x)):
            torch.testing.assert_close(pivoted(given).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_rank_below_the_full_one_is_smaller_than_dense(name: str, view: Any) -> None:
    dense = LAYERS[name]()
    spectrum = SVD(view, embeddings=True, factors="pivoted").spectrum(dense)
    costs = [spectrum.cost(rank) for rank in range(1, spectrum.max_rank)]
    assert spectrum.break_even == spectrum.max_rank - 1
    assert sorted(costs) == costs and all(cost < dense.weight.numel() for cost in costs)
    for rank in (1, spectrum.break_even):
        assert parameters(spectrum.factor(rank)) == spectrum.cost(rank)
        assert spectrum.rank_within(spectrum.cost(rank)) == rank
        assert spectrum.rank_within(spectrum.cost(rank) - 1) == rank - 1


def test_pivots_too_large_for_half_precision_end_in_one_line() -> None:
    """An approximation may have larger numbers than the weight, which are rows of the factors."""
    dense = nn.Linear(12, 10)
    with torch.no_grad():
        dense.weight.copy_(60_000 * torch.randn(10, 12).sign())
    SVD(factors="pivoted").spectrum(dense.bfloat16()).factor(5)
    spectrum = SVD(factors="pivoted").spectrum(dense.half())
    with pytest.raises(UserError, match="^a number is NaN or too large for float16; use bfloat16 or float32$"):
        spectrum.factor(5)
    with pytest.raises(UserError, match="^layer 0: a number is NaN or too large for float16"):
        spectrim.compress(nn.Sequential(dense), plan={"0": 5}, decomposer=SVD(factors="pivoted"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("name", ["linear", "tall", "groups", "embedding"])
def test_zero_and_singular_blocks_are_factored_at_every_rank(name: str, view: Any, dtype: torch.dtype) -> None:
    """Half of the outputs are zero (in groups: all of one group), the others are copies of one."""
    dense = LAYERS[name]().to(dtype)
    with torch.no_grad():
        outputs = dense.weight.t() if name == "embedding" else dense.weight
        outputs[: len(outputs) // 2] = 0
        outputs[len(outputs) // 2 :] = outputs[-1:].clone()
    spectrum = SVD(view, embeddings=True, factors="pivoted").spectrum(dense)
    for rank in range(1, spectrum.break_even + 1):
        layer = spectrum.factor(rank)
        assert layer.second.weight.isfinite().all() and layer.second.weight.abs().max() <= 2
        if view == "channel":  # of rank 1; a kernel in the spatial view has further rows
            torch.testing.assert_close(layer.weight, dense.weight, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "convolution", "embedding"])
def test_half_precision_costs_no_more_than_in_plain_factors(name: str, dtype: torch.dtype) -> None:
    dense = LAYERS[name]()
    exact = SVD("channel", embeddings=True).spectrum(dense).factor(3).weight.detach().double()
    errors = []
    for factors in ("plain", "pivoted"):
        layer = SVD("channel", embeddings=True, factors=factors).spectrum(dense.to(dtype)).factor(3)
        weight = layer.weight.detach()
        assert weight.dtype == dtype
        errors.append(float((weight.double() - exact).norm() / exact.norm()))
    assert errors[1] <= 4 * errors[0] and errors[1] < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["linear", "groups", "same"])
def test_autocast_keeps_the_precision_of_the_dense_layer(name: str) -> None:
    _, pivoted, dense = both(name, "channel", 2)
    x = inputs_of(dense)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert pivoted(x).dtype == dense(x).dtype == torch.bfloat16


def test_an_unbatched_input_is_taken_as_by_the_dense_layer() -> None:
    for name, shape in (("linear", (12,)), ("groups", (8, 9, 9)), ("convolution", (8, 9, 9))):
        plain, pivoted, _ = both(name, "channel", 2)
        x = torch.randn(shape)
        torch.testing.assert_close(pivoted(x), plain(x), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_plain_factors_are_taken_and_given_back(name: str) -> None:
    plain, pivoted, _ = both(name, "spatial", 2)
    other = [torch.randn_like(factor.weight) for factor in plain.factors]
    plain.fill_plain(other)
    pivoted.fill_plain(other)
    torch.testing.assert_close(pivoted.weight, plain.weight, atol=3e-5, rtol=1e-4)
    mine = pivoted.plain([factor.weight for factor in pivoted.factors])
    assert [weight.shape for weight in mine] == [factor.weight.shape for factor in plain.factors]
    torch.testing.assert_close(pivoted.product_of_plain(mine), plain.product(other), atol=3e-5, rtol=1e-4)


def test_a_training_reaches_pivots_and_coefficients() -> None:
    _, pivoted, dense = both("convolution", "spatial", 2)
    optimizer = torch.optim.SGD(pivoted.parameters(), 0.05)
    x = inputs_of(dense)
    target = dense(x).detach()
    before = float((pivoted(x).detach() - target).square().mean())
    for _ in range(20):
        optimizer.zero_grad()
        (pivoted(x) - target).square().mean().backward()
        optimizer.step()
    assert float((pivoted(x).detach() - target).square().mean()) < before


def test_the_dense_layer_comes_back() -> None:
    _, pivoted, dense = both("groups", "channel", 2)
    again, x = pivoted.dense_again(), inputs_of(dense)
    with evaluating(again), torch.no_grad():
        torch.testing.assert_close(again(x), pivoted(x), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("broken", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_positions_of_a_file_that_are_no_permutation_are_refused(broken: list[int]) -> None:
    layer = SVD(factors="pivoted").spectrum(nn.Linear(4, 3)).factor(1)
    layer.second.require_positions(layer.second.positions)
    with pytest.raises(UserError, match="no permutation"):
        layer.second.require_positions(torch.tensor(broken, dtype=torch.int32))


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("name", LAYERS)
def test_modules_of_torch_alone_compute_the_same(name: str, view: str) -> None:
    _, pivoted, dense = both(name, view, 2)
    plain, x = pivoted.plain_module(), inputs_of(dense)
    assert all(type(module).__module__.startswith("torch.") for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), pivoted(x), atol=3e-6, rtol=1e-5)
    assert sum(parameter.numel() for parameter in plain.parameters()) <= sum(own.numel() for own in dense.parameters())
