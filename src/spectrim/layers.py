"""Factored layers: drop-in replacements that compute a linear map as the product of two smaller ones."""

import torch
from torch import Tensor, nn

from spectrim.errors import UserError


class FactoredLinear(nn.Module):
    """``x -> (x A^T) B^T + b`` with A of shape (rank, in_features) and B of shape (out_features, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def shaped_like(cls, dense: nn.Linear, rank: int) -> "FactoredLinear":
        """An uninitialised factored layer for ``dense``, on its device and in its precision."""
        with torch.device("meta"):  # no random numbers are drawn for weights that will be overwritten
            layer = cls(dense.in_features, dense.out_features, rank, dense.bias is not None)
        return layer.to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        return self.second(self.first(input))


class FactoredConv2d(nn.Module):
    """A convolution as two. ``rank`` counts the channels between them, in each group.

    ``view="channel"``: a kh x kw convolution into ``groups * rank`` channels, then 1x1. ``view="spatial"``: a 1 x kw
    convolution, then kh x 1, each with its own half of stride, padding and dilation (Jaderberg et al., arXiv 1405.3866,
    scheme 2). The bias belongs to the second.
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, view: str) -> None:
        super().__init__()
        self.first, self.second, self.view = first, second, view
        self.rank = first.out_channels // first.groups

    @classmethod
    def shaped_like(cls, dense: nn.Conv2d, rank: int, view: str) -> "FactoredConv2d":
        """An uninitialised factored layer for ``dense``, on its device and in its precision."""
        middle, bias = rank * dense.groups, dense.bias is not None
        with torch.device("meta"):
            if view == "channel":
                first = _conv(dense, dense.in_channels, middle, dims=(0, 1))
                second = nn.Conv2d(middle, dense.out_channels, 1, groups=dense.groups, bias=bias)
            else:
                first = _conv(dense, dense.in_channels, middle, dims=(1,))
                second = _conv(dense, middle, dense.out_channels, dims=(0,), bias=bias)
        return cls(first, second, view).to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        return self.second(self.first(input))


def shaped_like(dense: nn.Module, rank: int, form: str) -> FactoredLinear | FactoredConv2d:
    """The uninitialised factored layer of ``form`` (``linear``, ``channel`` or ``spatial``) that replaces ``dense``."""
    if isinstance(dense, nn.Linear) and form == "linear":
        return FactoredLinear.shaped_like(dense, rank)
    if isinstance(dense, nn.Conv2d) and form in ("channel", "spatial"):
        return FactoredConv2d.shaped_like(dense, rank, form)
    raise UserError(f"a {type(dense).__name__} has no factored form called {form!r}")


def _conv(
    dense: nn.Conv2d, in_channels: int, out_channels: int, dims: tuple[int, ...], bias: bool = False
) -> nn.Conv2d:
    """A convolution with the kernel of ``dense`` along ``dims`` (0 vertical, 1 horizontal) and 1 along the others."""

    def along(values: tuple[int, ...], otherwise: int) -> tuple[int, int]:
        return tuple(values[d] if d in dims else otherwise for d in (0, 1))  # type: ignore[return-value]

    padding = dense.padding if isinstance(dense.padding, str) else along(dense.padding, 0)
    return nn.Conv2d(
        in_channels,
        out_channels,
        along(dense.kernel_size, 1),
        along(dense.stride, 1),
        padding,
        along(dense.dilation, 1),
        groups=dense.groups,
        bias=bias,
        padding_mode=dense.padding_mode,
    )
