"""Factored layers: drop-in replacements that compute the map of a dense layer as a product of smaller ones."""

from collections.abc import Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectrim.factored.base import BlockLinear, FactoredLayer, linear_of
from spectrim.factored.completion import Completion
from spectrim.factored.dense import DenseLayer
from spectrim.tools.precision import exact

Layer = TypeVar("Layer", bound=FactoredLayer)


def _empty_like(dense: nn.Module, layer: Layer) -> Layer:
    """Return ``layer`` uninitialised, in the precision and on the device of ``dense``, with its attributes."""
    weight = DenseLayer.of(dense).weight
    layer.adopt(dense)
    return layer.to(weight.dtype).to_empty(device=weight.device)


class FactoredLinear(FactoredLayer):
    """``x -> (x A^T) B^T + b`` with A of shape (rank, in_features) and B of shape (out_features, rank).

    With several ``subspaces``, each part of the input features has an A of its own with ``rank`` outputs.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, subspaces: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.stored_transposed = False
        middle = rank * subspaces
        self.first: nn.Linear | BlockLinear = (
            nn.Linear(in_features, middle, bias=False)
            if subspaces == 1
            else BlockLinear(in_features, middle, subspaces)
        )
        self.second: nn.Linear | Completion = nn.Linear(middle, out_features, bias=bias)

    @classmethod
    def shaped_like(cls, dense: nn.Module, rank: int, subspaces: int = 1) -> "FactoredLinear":
        """Return an uninitialised factored layer for ``dense``, on its device and in its precision."""
        own = DenseLayer.of(dense)
        with torch.device("meta"):  # no random numbers are drawn for weights that will be overwritten
            layer = cls(own.inputs, own.outputs, rank, own.bias is not None, subspaces)
        layer.stored_transposed = own.stored_transposed
        return _empty_like(dense, layer)

    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        return _product_of_two(weights, 1, self.rank)

    @property
    def weight(self) -> Tensor:
        W_OI = self.product([self.first.weight, self.second.weight]).squeeze(0)
        return W_OI.t() if self.stored_transposed else W_OI

    def plain_module(self) -> nn.Module:
        """Return two linear layers, or the dense one where that is smaller than a first one with zeros."""
        if isinstance(self.first, nn.Linear):
            return self.plain_pair()
        middle = self.first.weight.shape[0]
        if middle * (self.in_features + self.out_features) < self.in_features * self.out_features:
            return nn.Sequential(self.first.plain_module(), self.second)
        with torch.no_grad(), exact():
            W_OI = self.product([self.first.weight, self.second.weight]).squeeze(0)
        return linear_of(W_OI, self.bias, self.second.weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:  # the argument is named as in the dense layer
        return self.second(self.first(input))


class FactoredEmbedding(FactoredLayer):
    """``i -> B A[i]``: look up a row of ``rank`` numbers in A, then multiply by B (embedding_dim, rank).

    As in ALBERT (Lan et al., arXiv 1909.11942, section 3.1). ``whole_rows`` ids keep their rows as they are: those
    whose number in the buffer ``place`` (num_embeddings,) is below it. A holds the rows of all other ids. In a training
    the row at ``padding_idx`` of the dense embedding takes gradients as all others do.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, whole_rows: int = 0) -> None:
        super().__init__()
        self.rank, self.whole_rows = rank, whole_rows
        self.first: nn.Embedding = nn.Embedding(num_embeddings - whole_rows, rank)
        self.second: nn.Linear | Completion = nn.Linear(rank, embedding_dim, bias=False)
        if whole_rows:
            self.whole = nn.Embedding(whole_rows, embedding_dim)
            self.place: Tensor
            self.register_buffer("place", torch.empty(num_embeddings, dtype=torch.int32))

    @classmethod
    def shaped_like(cls, dense: nn.Embedding, rank: int, whole_rows: int = 0) -> "FactoredEmbedding":
        """Return an uninitialised factored embedding for ``dense``, on its device and in its precision."""
        with torch.device("meta"):
            layer = cls(dense.num_embeddings, dense.embedding_dim, rank, whole_rows)
        return _empty_like(dense, layer)

    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        A, B = weights
        return (B @ A.t()).unsqueeze(0)

    @property
    def weight(self) -> Tensor:
        rows = self.second(self.first.weight)
        return torch.cat([self.whole.weight, rows])[self.place] if self.whole_rows else rows

    def plain_module(self) -> nn.Module:
        """Return an embedding and a linear layer; the dense embedding where some rows are whole."""
        return self.dense_again() if self.whole_rows else self.plain_pair()

    def forward(self, input: Tensor) -> Tensor:  # the argument is named as in the dense layer
        if not self.whole_rows:
            return self.second(self.first(input))
        place = self.place[input]
        rows = self.second(self.first((place - self.whole_rows).clamp_min(0)))
        own = self.whole(place.clamp_max(self.whole_rows - 1))
        return torch.where((place < self.whole_rows).unsqueeze(-1), own, rows)


class FactoredConv2d(FactoredLayer):
    """A convolution as two. ``rank`` counts the channels between them, in each group and subspace.

    ``view="channel"``: a kh x kw convolution into ``groups * rank`` channels, then 1x1. ``view="spatial"``: a 1 x kw
    convolution, then kh x 1 (Jaderberg et al., arXiv 1405.3866, scheme 2). Each has its own half of stride, padding and
    dilation. ``view="vertical"``: the same two in the other order. The second holds the bias.

    ``subspaces`` are groups of the first convolution alone (Liebenwein et al., arXiv 2107.11442). Each part of the
    input channels of a group has ``rank`` channels of its own, and the second convolution sees all of them.
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, view: str) -> None:
        super().__init__()
        self.first: nn.Conv2d = first
        self.second: nn.Conv2d | Completion = second
        self.view, self.rank = view, first.out_channels // first.groups

    @classmethod
    def shaped_like(cls, dense: nn.Conv2d, rank: int, view: str, subspaces: int = 1) -> "FactoredConv2d":
        """Return an uninitialised factored layer for ``dense``, on its device and in its precision."""
        blocks, bias = dense.groups * subspaces, dense.bias is not None
        middle = rank * blocks
        with torch.device("meta"):
            if view == "channel":
                first = _conv(dense, dense.in_channels, middle, dims=(0, 1), groups=blocks)
                second = nn.Conv2d(middle, dense.out_channels, 1, groups=dense.groups, bias=bias)
            else:
                along, across = (0, 1) if view == "vertical" else (1, 0)
                first = _conv(dense, dense.in_channels, middle, dims=(along,), groups=blocks)
                second = _conv(dense, middle, dense.out_channels, dims=(across,), bias=bias)
        return _empty_like(dense, cls(first, second, view))

    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        return _product_of_two(weights, self.second.groups, self.rank)

    @property
    def weight(self) -> Tensor:
        return _kernel(self, (self.first, self.second))

    def plain_module(self) -> nn.Module:
        """Return two convolutions."""
        return self.plain_pair()

    def forward(self, input: Tensor) -> Tensor:  # the argument is named as in the dense layer
        return self.second(self.first(input))


class TuckerConv2d(FactoredLayer):
    """A convolution as three: 1x1 into ``groups * inputs`` channels, kh x kw into ``groups * outputs``, then 1x1.

    The second has the stride, padding and dilation of the dense one, the third its bias (Kim et al., arXiv 1511.06530).
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, third: nn.Conv2d) -> None:
        super().__init__()
        self.first: nn.Conv2d = first
        self.second: nn.Conv2d = second
        self.third = third

    @classmethod
    def shaped_like(cls, dense: nn.Conv2d, outputs: int, inputs: int) -> "TuckerConv2d":
        """Return an uninitialised factored layer with these ranks in each group, placed as ``dense`` is."""
        groups, bias = dense.groups, dense.bias is not None
        with torch.device("meta"):
            first = nn.Conv2d(dense.in_channels, groups * inputs, 1, groups=groups, bias=False)
            second = _conv(dense, groups * inputs, groups * outputs, dims=(0, 1))
            third = nn.Conv2d(groups * outputs, dense.out_channels, 1, groups=groups, bias=bias)
        return _empty_like(dense, cls(first, second, third))

    @property
    def factors(self) -> tuple[nn.Conv2d, ...]:
        return self.first, self.second, self.third

    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        A, C, B = (weight.unflatten(0, (self.first.groups, -1)) for weight in weights)
        return torch.einsum("gopyx,gpqhw,gqizv->goihw", B, C, A).flatten(2)

    @property
    def weight(self) -> Tensor:
        return _kernel(self, self.factors)

    def plain_module(self) -> nn.Module:
        """Return three convolutions."""
        return nn.Sequential(*self.factors)

    def forward(self, input: Tensor) -> Tensor:  # the argument is named as in the dense layer
        return self.third(self.second(self.first(input)))


def pivoted_like(layer: FactoredLayer, rank: int) -> FactoredLayer:
    """Return ``layer``, uninitialised, with a second factor that holds coefficients of pivots alone."""
    plain = layer.second
    assert isinstance(plain, nn.Linear | nn.Conv2d)
    with torch.device("meta"):
        second = Completion.of(plain, rank)
    layer.second = second.to(plain.weight.dtype).to_empty(device=plain.weight.device)
    second.start()
    return layer


def _product_of_two(weights: Sequence[Tensor], groups: int, rank: int) -> Tensor:
    A, B = weights
    A = A.reshape(groups, -1, rank, A.shape[1], *(A.shape[2:] or (1, 1)))
    B = B.reshape(groups, -1, A.shape[1], rank, *(B.shape[2:] or (1, 1)))
    return torch.einsum("gosrab,gsricd->gosiacbd", B, A).flatten(2)


def _kernel(layer: FactoredConv2d | TuckerConv2d, factors: Sequence[nn.Conv2d | Completion]) -> Tensor:
    """Return the product of the convolutions ``factors`` in the shape of the dense weight, (O, I / groups, kh, kw)."""
    size = [prod(sides) for sides in zip(*(factor.kernel_size for factor in factors), strict=True)]
    return layer.product([factor.weight for factor in factors]).flatten(0, 1).unflatten(1, (-1, *size))


def _conv(
    dense: nn.Conv2d,
    in_channels: int,
    out_channels: int,
    dims: tuple[int, ...],
    bias: bool = False,
    groups: int | None = None,
) -> nn.Conv2d:
    """Return a convolution with the kernel of ``dense`` along ``dims`` (0 vertical, 1 horizontal), and 1 elsewhere.

    ``groups``: those of ``dense`` by default.
    """

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
        groups=groups or dense.groups,
        bias=bias,
        padding_mode=dense.padding_mode,
    )
