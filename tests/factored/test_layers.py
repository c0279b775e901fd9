"""A factored layer computes the product of its factors, in the place, precision and shape of the dense one."""

import pytest
import torch
from torch import nn

from spectrim.factored.layers import FactoredConv2d, FactoredLinear, TuckerConv2d


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
