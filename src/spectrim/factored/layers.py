"""Factored layers: drop-in replacements that compute a linear map as the product of two smaller ones."""

import re
import sys
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spectrim.errors import UserError


def transposed() -> tuple[type[nn.Module], ...]:
    """The classes of Linear layers whose weight is stored as (inputs, outputs): transformers' Conv1D, which GPT-2 uses.

    None where transformers was not imported: then no model can hold one.
    """
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def dense_kinds() -> tuple[type[nn.Module], ...]:
    """The classes of layers that can be factored; an embedding is where the decomposer says so."""
    return nn.Linear, nn.Conv2d, nn.Embedding, *transposed()


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` multiplies by one matrix, in whichever way it stores that."""
    return isinstance(layer, (nn.Linear, *transposed()))


def is_stored_transposed(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` has the shape (inputs, outputs); an embedding's inputs are the ids it knows."""
    return isinstance(layer, (nn.Embedding, *transposed()))


def inputs_of(layer: nn.Module) -> int:
    """How many inputs, of each group, a layer that can be factored has."""
    weight = cast(Tensor, layer.weight)
    return weight.shape[0] if is_stored_transposed(layer) else weight.shape[1]


class BlockLinear(nn.Module):
    """What a grouped convolution is to a convolution: features in ``blocks``, each mapped by a matrix of its own.

    ``weight``: the matrices one above the other, shape (out_features, in_features / blocks). No bias.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // blocks))

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input.unflatten(-1, (self.blocks, -1)), self.weight.unflatten(0, (self.blocks, -1))
        return torch.einsum("...bi,bri->...br", x, weight).flatten(-2)


class FactoredLinear(nn.Module):
    """``x -> (x A^T) B^T + b`` with A of shape (rank, in_features) and B of shape (out_features, rank).

    With several ``subspaces`` each part of the input features has an A of its own, and ``rank`` outputs of it.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, subspaces: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        middle = rank * subspaces
        self.first: nn.Linear | BlockLinear = (
            nn.Linear(in_features, middle, bias=False)
            if subspaces == 1
            else BlockLinear(in_features, middle, subspaces)
        )
        self.second = nn.Linear(middle, out_features, bias=bias)

    @classmethod
    def shaped_like(cls, dense: nn.Linear, rank: int, subspaces: int = 1) -> "FactoredLinear":
        """An uninitialised factored layer for ``dense``, on its device and in its precision."""
        outputs, inputs = reversed(dense.weight.shape) if isinstance(dense, transposed()) else dense.weight.shape
        with torch.device("meta"):  # no random numbers are drawn for weights that will be overwritten
            layer = cls(inputs, outputs, rank, dense.bias is not None, subspaces)
        return layer.to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        return self.second(self.first(input))


class FactoredEmbedding(nn.Module):
    """``i -> B A[i]``: a row of ``rank`` numbers looked up in A, then B (embedding_dim, rank).

    As in ALBERT (Lan et al., arXiv 1909.11942, section 3.1). As many ids as ``kept`` says have whole rows of their own
    instead: those whose number in ``place`` (num_embeddings,), a buffer, is below it. A holds the rows of all others.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, kept: int = 0) -> None:
        super().__init__()
        self.rank, self.kept = rank, kept
        self.first = nn.Embedding(num_embeddings - kept, rank)
        self.second = nn.Linear(rank, embedding_dim, bias=False)
        if kept:
            self.whole = nn.Embedding(kept, embedding_dim)
            self.register_buffer("place", torch.empty(num_embeddings, dtype=torch.int32))

    @classmethod
    def shaped_like(cls, dense: nn.Embedding, rank: int, kept: int = 0) -> "FactoredEmbedding":
        """An uninitialised factored embedding for ``dense``, on its device and in its precision."""
        if kept >= dense.num_embeddings:
            raise UserError(f"of {dense.num_embeddings} rows {kept} are to be kept, which leaves none to be factored")
        with torch.device("meta"):
            layer = cls(dense.num_embeddings, dense.embedding_dim, rank, kept)
        return layer.to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        if not self.kept:
            return self.second(self.first(input))
        place = cast(Tensor, self.place)[input]
        product = self.second(self.first((place - self.kept).clamp_min(0)))
        own = self.whole(place.clamp_max(self.kept - 1))
        return torch.where((place < self.kept).unsqueeze(-1), own, product)


class FactoredConv2d(nn.Module):
    """A convolution as two. ``rank`` counts the channels between them, in each group and subspace.

    ``view="channel"``: a kh x kw convolution into ``groups * rank`` channels, then 1x1. ``view="spatial"``: a 1 x kw
    convolution, then kh x 1, each with its own half of stride, padding and dilation (Jaderberg et al., arXiv 1405.3866,
    scheme 2); ``view="vertical"``: the two in the other order. The bias belongs to the second. ``subspaces`` are groups
    of the first alone (Liebenwein et al., arXiv 2107.11442): each part of the input channels of a group has ``rank``
    channels of its own, and the second sees all.
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, view: str) -> None:
        super().__init__()
        self.first, self.second, self.view = first, second, view
        self.rank = first.out_channels // first.groups

    @classmethod
    def shaped_like(cls, dense: nn.Conv2d, rank: int, view: str, subspaces: int = 1) -> "FactoredConv2d":
        """An uninitialised factored layer for ``dense``, on its device and in its precision."""
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
        return cls(first, second, view).to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        return self.second(self.first(input))


class TuckerConv2d(nn.Module):
    """A convolution as three: 1x1 into ``groups * inputs`` channels, kh x kw into ``groups * outputs``, then 1x1.

    The second has stride, padding and dilation of the dense one, the third its bias (Kim et al., arXiv 1511.06530).
    """

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, third: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second, self.third = first, second, third

    @classmethod
    def shaped_like(cls, dense: nn.Conv2d, outputs: int, inputs: int) -> "TuckerConv2d":
        """An uninitialised factored layer for ``dense`` with these ranks in each group, on its device and precision."""
        groups, bias = dense.groups, dense.bias is not None
        with torch.device("meta"):
            first = nn.Conv2d(dense.in_channels, groups * inputs, 1, groups=groups, bias=False)
            second = _conv(dense, groups * inputs, groups * outputs, dims=(0, 1))
            third = nn.Conv2d(groups * outputs, dense.out_channels, 1, groups=groups, bias=bias)
        return cls(first, second, third).to(dense.weight.dtype).to_empty(device=dense.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # named as in the layer that this one replaces
        return self.third(self.second(self.first(input)))


Factored = FactoredLinear | FactoredConv2d | TuckerConv2d  # of what flows in; an embedding is of ids


def factors_of(layer: Factored) -> list[nn.Module]:
    """The layers of which ``layer`` is the product, in the order in which they are applied."""
    return [layer.first, layer.second, *([layer.third] if isinstance(layer, TuckerConv2d) else [])]


def composed(layer: Factored, weights: Sequence[Tensor]) -> Tensor:
    """The one matrix a group, in the channel view, that factors with these ``weights`` amount to: shape (g, O, I).

    Differentiable in the weights, which come in the order of ``factors_of``.
    """
    if isinstance(layer, TuckerConv2d):
        (A, C, B), groups = weights, layer.first.groups
        A, C, B = (factor.unflatten(0, (groups, -1)) for factor in (A, C, B))
        return torch.einsum("gopyx,gpqhw,gqizv->goihw", B, C, A).flatten(2)
    groups, rank = getattr(layer.second, "groups", 1), layer.rank
    kernels = [weight.shape[2:] or (1, 1) for weight in weights]
    A = weights[0].reshape(groups, -1, rank, weights[0].shape[1], *kernels[0])
    B = weights[1].reshape(groups, -1, A.shape[1], rank, *kernels[1])
    return torch.einsum("gosrab,gsricd->gosiacbd", B, A).flatten(2)


def tucker_form(outputs: int, inputs: int) -> str:
    """The name of the form with these ranks of the outputs and of the inputs in each group."""
    return f"tucker {outputs}x{inputs}"


def subspace_form(form: str, subspaces: int) -> str:
    """The name of ``form`` (linear, channel, spatial) with the inputs, in each group, in so many subspaces."""
    return form if subspaces == 1 else f"{form} in {subspaces}"


def embedding_form(kept: int) -> str:
    """The name of the form of an embedding that keeps so many of its rows as they are."""
    return f"embedding but {kept}" if kept else "embedding"


def shaped_like(dense: nn.Module, rank: int, form: str) -> Factored | FactoredEmbedding:
    """The uninitialised factored layer of ``form`` that replaces ``dense``.

    ``linear``; ``embedding``, ``embedding but 100``; for a convolution ``channel``, ``spatial``, ``vertical`` or, with
    both of its ranks in the name, ``tucker 12x7``. With the inputs in four subspaces: ``linear in 4``, ``channel in
    4``, ``spatial in 4``.
    """
    base, _, parts = form.partition(" in ")
    subspaces = int(parts) if re.fullmatch(r"[2-9]|[1-9]\d+", parts) else 1
    known = form == subspace_form(base, subspaces)
    if known and isinstance(dense, dense_kinds()) and inputs_of(dense) % subspaces:
        raise UserError(f"the {inputs_of(dense)} inputs of a {type(dense).__name__} are not {subspaces} subspaces")
    if known and is_linear(dense) and base == "linear":
        return FactoredLinear.shaped_like(cast(nn.Linear, dense), rank, subspaces)
    if known and isinstance(dense, nn.Conv2d) and base in ("channel", "spatial", "vertical"):
        return FactoredConv2d.shaped_like(dense, rank, base, subspaces)
    if isinstance(dense, nn.Embedding) and (number := re.fullmatch(r"embedding(?: but ([1-9]\d*))?", form)):
        return FactoredEmbedding.shaped_like(dense, rank, int(number[1] or 0))
    if isinstance(dense, nn.Conv2d) and (ranks := re.fullmatch(r"tucker ([1-9]\d*)x([1-9]\d*)", form)):
        return TuckerConv2d.shaped_like(dense, int(ranks[1]), int(ranks[2]))
    raise UserError(f"a {type(dense).__name__} has no factored form called {form!r}")


def of_plan(dense: nn.Module, rank: int, form: str) -> Factored | FactoredEmbedding:
    """Return ``shaped_like`` for a plan that was read from a file, whose ranks may be of any size.

    A Tucker form is bounded by the two ranks in its name: its ``rank`` counts the directions of both sides together.
    Raises ``UserError`` for a rank above the full rank of ``dense``, before memory is taken.
    """
    ranks = map(int, re.findall(r"\d+", form)) if form.startswith("tucker ") else (rank,)
    if isinstance(dense, dense_kinds()):
        most = _full_rank(dense)
        for own in ranks:
            if own > most:
                raise UserError(f"rank {own} of form {form!r} is above the full rank of this layer, {most}")
    return shaped_like(dense, rank, form)


def _full_rank(dense: nn.Module) -> int:
    """Return the largest rank that the weight of ``dense`` can have in any view."""
    weight = cast(Tensor, dense.weight)
    if isinstance(dense, nn.Conv2d):
        return min(weight.shape[0] * max(dense.kernel_size), weight[0].numel())
    return min(weight.shape)


def _conv(
    dense: nn.Conv2d,
    in_channels: int,
    out_channels: int,
    dims: tuple[int, ...],
    bias: bool = False,
    groups: int | None = None,
) -> nn.Conv2d:
    """A convolution with the kernel of ``dense`` along ``dims`` (0 vertical, 1 horizontal) and 1 along the others.

    And with its ``groups``, if no others are given.
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
