"""SVD in subspaces: the blocks are those of the input channels, and each is the best of its rank."""

from typing import Any

import pytest
import torch
from torch import nn

from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.factored.base import BlockLinear
from spectrim.factored.forms import PlainForm
from spectrim.factored.layers import FactoredConv2d, FactoredLinear

LAYERS: Any = [
    lambda: nn.Linear(12, 10),
    lambda: nn.Conv2d(8, 9, (3, 2), stride=(1, 2), padding=1, bias=False),
    lambda: nn.Conv2d(16, 12, 3, dilation=2, groups=2),
]


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("subspaces", [2, 4])
@pytest.mark.parametrize("make", LAYERS)
def test_curves_and_outputs_are_those_of_the_factored_weight_at_every_rank(
    make: Any, subspaces: int, view: Any, weight_of: Any
) -> None:
    layer = make().double()
    groups, G = getattr(layer, "groups", 1), torch.randn_like(layer.weight)
    spectrum = SubspaceSVD(subspaces, view).spectrum(layer)
    x = torch.randn(3, 12) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 7, 8)
    x = x.double()
    for rank in range(1, spectrum.max_rank + 1):
        factored = spectrum.factor(rank)
        weight = weight_of(factored, groups).detach()
        change = weight - layer.weight
        torch.testing.assert_close(spectrum.error()[rank], change.norm(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(spectrum.largest_entry()[rank], change.abs().max(), atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(spectrum.first_order(G)[rank], (G * change).sum(), atol=1e-12, rtol=1e-9)
        assert sum(p.numel() for n, p in factored.named_parameters() if "bias" not in n) == spectrum.cost(rank)
        dense = make().double()
        dense.load_state_dict(layer.state_dict() | {"weight": weight})
        torch.testing.assert_close(factored(x), dense(x))


def test_each_block_is_the_truncated_svd_of_its_input_channels(weight_of: Any) -> None:
    layer = nn.Conv2d(8, 10, 3)
    weight = weight_of(SubspaceSVD(4).spectrum(layer).factor(2), 1)
    for start in range(0, 8, 2):
        block = layer.weight[:, start : start + 2].flatten(1)
        U, S, Vh = torch.linalg.svd(block, full_matrices=False)
        best = U[:, :2] @ S[:2].diag() @ Vh[:2]
        torch.testing.assert_close(weight[:, start : start + 2].flatten(1), best, atol=1e-5, rtol=1e-4)


def test_the_first_factor_is_grouped_and_the_form_says_so() -> None:
    conv = SubspaceSVD(4).spectrum(nn.Conv2d(16, 12, 3, groups=2))
    factored = conv.factor(2)
    assert isinstance(factored, FactoredConv2d)
    assert (conv.kept(1).form, factored.first.groups, factored.second.groups) == (PlainForm("channel", 4), 8, 2)
    assert factored.rank == 2
    linear = SubspaceSVD(3).spectrum(nn.Linear(12, 10)).factor(2)
    assert isinstance(linear, FactoredLinear) and isinstance(linear.first, BlockLinear) and linear.rank == 2


@pytest.mark.parametrize(("inputs", "subspaces"), [(12, 4), (6, 2), (3, 1)])
def test_subspaces_are_as_many_as_divide_the_channels(inputs: int, subspaces: int) -> None:
    assert SubspaceSVD(4).spectrum(nn.Conv2d(inputs, 8, 3)).kept(1).form == PlainForm("channel", subspaces)


def test_one_subspace_is_the_plain_svd() -> None:
    layer = nn.Conv2d(6, 8, 3)
    one, plain = SubspaceSVD(1).spectrum(layer), SVD().spectrum(layer)
    assert one.kept(1).form == plain.kept(1).form and torch.equal(one.error(), plain.error())
