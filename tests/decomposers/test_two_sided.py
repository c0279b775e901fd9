"""The two-sided SVD changes the loss least by K-FAC's prediction, and no moment breaks it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.decomposers.matrix import to_matrix
from spectrim.decomposers.spectrum import outputs_of
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer

LAYERS = [(nn.Linear(9, 6), 1), (nn.Linear(5, 8), 1), (nn.Conv2d(4, 6, 3, groups=2), 2), (nn.Conv2d(2, 9, 3), 1)]


def moment(groups: int, size: int, rank: int | None = None) -> Tensor:
    """A second moment with eigenvalues that spread over four orders of magnitude; of ``rank``, if given."""
    x = torch.randn(groups, 4 * size, size).double() * torch.logspace(0, -2, size).double()
    if rank is not None:
        x[:, :, rank:] = 0
    return x.transpose(1, 2) @ x / x.shape[1]


def moments_of(layer: Any, view: Any, rank: int | None = None) -> dict[str, Tensor]:
    dense = DenseLayer.of(layer)
    outputs, inputs = dense.sides(dense.view(view))
    own = dense.view(view)
    return {own: moment(dense.groups, inputs, rank), outputs_of(own): moment(dense.groups, outputs, rank)}


def predicted_change(change: Tensor, layer: Any, view: Any, moments: dict[str, Tensor]) -> Tensor:
    D, own = to_matrix(change, DenseLayer.of(layer), view).double(), DenseLayer.of(layer).view(view)
    return torch.einsum("gop,gpj,gji,goi->", moments[outputs_of(own)], D, moments[own], D)


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize(("layer", "groups"), LAYERS)
def test_the_predicted_change_is_that_of_the_factored_layer_and_below_that_of_one_side(
    layer: Any, groups: int, view: Any, weight_of: Any
) -> None:
    layer = layer.double()
    moments = moments_of(layer, view)
    both = TwoSidedSVD(view, ridge=1e-12, damping=1e-12).spectrum(layer, moments)
    one, better = WhitenedSVD(view, ridge=1e-12).spectrum(layer, moments), 0
    for k in range(1, both.max_rank + 1):
        change = weight_of(both.factor(k), groups) - layer.weight
        mine = predicted_change(change, layer, view, moments)
        torch.testing.assert_close(both.weighted_error()[k].square(), mine, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(both.error()[k], change.norm(), atol=1e-7, rtol=1e-7)
        theirs = predicted_change(weight_of(one.factor(k), groups) - layer.weight, layer, view, moments)
        assert mine <= theirs + 1e-7
        better += bool(mine < 0.95 * theirs)
    assert better  # not one and the same decomposition


def test_the_error_of_any_subset_of_components_is_that_of_the_factored_layer(weight_of: Any) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    spectrum = TwoSidedSVD("channel").spectrum(layer, moments_of(layer, "channel"))
    for keep in ((0, 2), (1,), 2):
        change = (weight_of(spectrum.factor(keep), 2) - layer.weight).detach()
        expected = float(change.norm() / layer.weight.detach().norm())
        assert spectrum.relative_error_at(keep) == pytest.approx(expected, rel=1e-7)


def test_equal_gradients_at_all_outputs_give_the_one_sided_decomposition(weight_of: Any) -> None:
    layer = nn.Linear(9, 6).double()
    moments = moments_of(layer, "channel") | {outputs_of("linear"): 0.3 * torch.eye(6).double().unsqueeze(0)}
    both, one = (kind.spectrum(layer, moments) for kind in (TwoSidedSVD(), WhitenedSVD()))
    torch.testing.assert_close(weight_of(both.factor(3), 1), weight_of(one.factor(3), 1), atol=1e-9, rtol=1e-9)
    heavy = TwoSidedSVD(damping=1e9).spectrum(layer, moments_of(layer, "channel") | {"linear": moments["linear"]})
    torch.testing.assert_close(weight_of(heavy.factor(3), 1), weight_of(one.factor(3), 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize(("layer", "groups"), LAYERS)
def test_full_rank_gives_the_weight_back_whatever_the_moments(
    layer: Any, groups: int, rank: int, weight_of: Any
) -> None:
    layer = layer.double()
    spectrum = TwoSidedSVD("spatial", damping=1e-6).spectrum(layer, moments_of(layer, "spatial", rank))
    factored = weight_of(spectrum.factor(spectrum.max_rank), groups)
    torch.testing.assert_close(factored, layer.weight, atol=1e-9, rtol=1e-9)


def test_first_order_change_is_the_inner_product_with_the_change(weight_of: Any) -> None:
    layer = nn.Linear(9, 6).double()
    spectrum, G = TwoSidedSVD().spectrum(layer, moments_of(layer, "channel")), torch.randn(6, 9).double()
    for k in range(1, 7):
        change = weight_of(spectrum.factor(k), 1) - layer.weight
        torch.testing.assert_close(spectrum.first_order(G)[k], (G * change).sum(), atol=1e-10, rtol=1e-9)


def test_bad_input_is_one_line() -> None:
    layer, own = nn.Linear(3, 3), torch.eye(3).unsqueeze(0)
    for moments, message in (
        ({"linear": own * float("nan"), outputs_of("linear"): own}, "the inputs of a layer hold NaN"),
        ({"linear": own, outputs_of("linear"): own * float("nan")}, "gradients at the outputs of a layer hold NaN"),
        ({"linear": own}, "inputs and gradients"),
    ):
        with pytest.raises(UserError, match=message):
            TwoSidedSVD().spectrum(layer, moments)
    for wrong in ({"ridge": 0.0}, {"damping": 0.0}, {"samples": 0}, {"top": 1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must be"):
            TwoSidedSVD(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="labels=false"):
        TwoSidedSVD(top=5, labels=True)
