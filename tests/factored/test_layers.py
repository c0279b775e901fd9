"""A factored layer computes the product of its factors, in the place, precision and shape of the dense one."""

import pytest
import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d, FactoredLinear, TuckerConv2d, of_plan, shaped_like


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_linear_is_the_product_of_its_factors() -> None:
    layer = filled(FactoredLinear(7, 5, 2))
    product = layer.second.weight @ layer.first.weight
    x = torch.randn(3, 4, 7)
    torch.testing.assert_close(layer(x), x @ product.T + layer.second.bias)
    torch.testing.assert_close(layer(input=x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_holds_rank_times_both_sides(bias: bool) -> None:
    layer = FactoredLinear.shaped_like(nn.Linear(7, 5, bias), 2)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (7 + 5) + 5 * bias


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_hold_rank_times_the_cost_of_their_view(groups: int) -> None:
    dense = nn.Conv2d(8, 6, (3, 5), groups=groups)
    channel, spatial = (FactoredConv2d.shaped_like(dense, 2, view) for view in ("channel", "spatial"))
    inputs, outputs = 8 // groups, 6 // groups
    assert sum(p.numel() for p in channel.parameters()) == 2 * groups * (outputs + inputs * 3 * 5) + 6
    assert sum(p.numel() for p in spatial.parameters()) == 2 * groups * (outputs * 3 + inputs * 5) + 6
    assert channel.rank == spatial.rank == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_tucker_holds_both_sides_and_the_core(groups: int) -> None:
    dense = nn.Conv2d(8, 6, (3, 5), groups=groups)
    layer = TuckerConv2d.shaped_like(dense, outputs=2, inputs=3)
    inputs, outputs = 8 // groups, 6 // groups
    assert sum(p.numel() for p in layer.parameters()) == groups * (3 * inputs + 2 * 3 * 3 * 5 + 2 * outputs) + 6


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker 2x1"])
@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
def test_output_has_the_dense_shape(form: str, stride: int, padding: int, dilation: int) -> None:
    dense = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation, groups=2)
    x = torch.randn(2, 4, 11, 10)
    layer = shaped_like(dense, 1, form)
    assert filled(layer)(x).shape == dense(x).shape


@pytest.mark.parametrize(
    ("dense", "form"),
    [(nn.Linear(3, 3), "linear"), (nn.Conv2d(3, 3, 3), "spatial"), (nn.Conv2d(3, 3, 3), "tucker 2x1")],
)
def test_precision_is_the_dense_one(dense: nn.Module, form: str) -> None:
    layer = shaped_like(dense.to(torch.float64), 1, form)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in shaped_like(dense.to("meta"), 1, form).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("dense", "form"),
    [
        (nn.Linear(3, 3), "channel"),
        (nn.Conv2d(3, 3, 3), "linear"),
        (nn.Conv2d(3, 3, 3), "tucker"),
        (nn.Conv2d(3, 3, 3), "tucker 0x2"),
        (nn.Linear(3, 3), "tucker 2x2"),
        (nn.ReLU(), "linear"),
    ],
)
def test_a_form_that_the_layer_cannot_take_is_refused(dense: nn.Module, form: str) -> None:
    with pytest.raises(UserError, match="no factored form"):
        shaped_like(dense, 1, form)


@pytest.mark.parametrize("rank", [10**9, 2**64])
@pytest.mark.parametrize(
    ("dense", "form"),
    [
        (nn.Linear(6, 4), "linear"),
        (nn.Linear(6, 4), "linear in 2"),
        (nn.Conv2d(4, 6, 3), "channel"),
        (nn.Conv2d(4, 6, 3), "spatial"),
        (nn.Conv2d(4, 6, 1), "vertical"),
        (nn.Embedding(9, 4), "embedding"),
    ],
)
def test_a_rank_beyond_the_layer_is_refused_before_memory_is_taken(dense: nn.Module, form: str, rank: int) -> None:
    with pytest.raises(UserError, match=f"rank {rank} .* is above the full rank of this layer"):
        of_plan(dense, rank, form)


def test_a_tucker_form_beyond_the_layer_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(UserError, match=r"is above the full rank"):
        of_plan(nn.Conv2d(4, 6, 3), 2, f"tucker 2x{10**9}")


def test_a_tucker_plan_may_keep_more_directions_than_either_side_has() -> None:
    """Its rank counts the directions of both sides: 12 of 16 outputs and 40 of 64 inputs are rank 51."""
    layer = of_plan(nn.Conv2d(64, 16, 3), 51, "tucker 12x40")
    assert isinstance(layer, TuckerConv2d) and layer.second.weight.shape == (12, 40, 3, 3)
