"""Whitened SVD is the best approximation of a layer's outputs, and never divides by what may be zero."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.decomposers.matrix import to_matrix
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer

LAYERS = [(nn.Linear(9, 6), 1), (nn.Linear(5, 8), 1), (nn.Conv2d(4, 6, 3, groups=2), 2), (nn.Conv2d(2, 9, 3), 1)]


def moment_of(layer: Any, view: str, rank: int | None = None) -> Tensor:
    """A second moment with eigenvalues that spread over four orders of magnitude; of ``rank``, if given."""
    matrix = to_matrix(layer.weight.detach(), DenseLayer.of(layer), view)
    groups, _, size = matrix.shape
    x = torch.randn(groups, 4 * size, size).double() * torch.logspace(0, -2, size).double()
    if rank is not None:
        x[:, :, rank:] = 0
    return x.transpose(1, 2) @ x / x.shape[1]


def output_change(change: Tensor, layer: Any, view: str, moment: Tensor) -> Tensor:
    matrix = to_matrix(change, DenseLayer.of(layer), view).double()
    return torch.einsum("goi,gij,goj->", matrix, moment, matrix).sqrt()


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize(("layer", "groups"), LAYERS)
def test_weighted_error_is_that_of_the_factored_layer_and_below_that_of_plain_svd(
    layer: Any, groups: int, view: Any, weight_of: Any
) -> None:
    layer = layer.double()
    moment = moment_of(layer, view)
    whitened = WhitenedSVD(view, ridge=1e-12).spectrum(layer, {DenseLayer.of(layer).view(view): moment})
    plain = SVD(view).spectrum(layer)
    better = 0
    for k in range(1, whitened.max_rank + 1):
        change = weight_of(whitened.factor(k), groups) - layer.weight
        mine = output_change(change, layer, view, moment)
        torch.testing.assert_close(whitened.weighted_error()[k], mine, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(whitened.error()[k], change.norm(), atol=1e-9, rtol=1e-9)
        theirs = output_change(weight_of(plain.factor(k), groups) - layer.weight, layer, view, moment)
        assert mine <= theirs + 1e-6
        better += bool(mine < 0.95 * theirs)
    assert better  # not one and the same decomposition


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(("layer", "groups"), LAYERS)
def test_full_rank_gives_the_weight_back_whatever_the_moment(
    layer: Any, groups: int, rank: int, weight_of: Any
) -> None:
    layer = layer.double()
    moments = {DenseLayer.of(layer).view("spatial"): moment_of(layer, "spatial", rank)}
    spectrum = WhitenedSVD("spatial").spectrum(layer, moments)
    factored = weight_of(spectrum.factor(spectrum.max_rank), groups)
    torch.testing.assert_close(factored, layer.weight, atol=1e-9, rtol=1e-9)


def test_first_order_change_is_the_inner_product_with_the_change(weight_of: Any) -> None:
    layer = nn.Linear(9, 6).double()
    spectrum, G = WhitenedSVD().spectrum(layer, {"linear": moment_of(layer, "channel")}), torch.randn(6, 9).double()
    for k in range(1, 7):
        change = weight_of(spectrum.factor(k), 1) - layer.weight
        torch.testing.assert_close(spectrum.first_order(G)[k], (G * change).sum(), atol=1e-10, rtol=1e-9)


def test_bad_input_is_one_line() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(UserError, match="NaN or infinity"):
        WhitenedSVD().spectrum(layer, {"linear": torch.full((1, 3, 3), float("nan"))})
    with pytest.raises(UserError, match="second moment"):
        WhitenedSVD().spectrum(layer, {"channel": torch.ones(1, 3, 3)})
    with pytest.raises(UserError, match="ridge must be above 0"):
        WhitenedSVD(ridge=0.0)
    with pytest.raises(UserError, match="samples must be at least 1"):
        WhitenedSVD(samples=0)
