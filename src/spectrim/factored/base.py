"""The base of all factored layers: their factors, and the attributes of the dense layer."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectrim.factored.completion import Completion, Transposed, factor_matrices, factor_weight
from spectrim.factored.dense import attributes_of, dense_kinds
from spectrim.factored.linalg import in_precision
from spectrim.tools.precision import exact


class BlockLinear(nn.Module):
    """A grouped linear layer: the features lie in ``blocks``, and each block has a matrix of its own. It has no bias.

    ``weight``: the matrices of all blocks stacked along the outputs, shape (out_features, in_features / blocks).
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // blocks))

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input.unflatten(-1, (self.blocks, -1)), self.weight.unflatten(0, (self.blocks, -1))
        return torch.einsum("...bi,bri->...br", x, weight).flatten(-2)

    @torch.no_grad()
    def plain_module(self) -> nn.Linear:
        """Return the linear layer with the same map, whose weight is zero outside of the blocks."""
        weight = torch.block_diag(*self.weight.unflatten(0, (self.blocks, -1)))
        return linear_of(weight, None, self.weight.requires_grad)


Factor = nn.Linear | BlockLinear | nn.Conv2d | nn.Embedding | Completion | Transposed


# The names that factored layers use for themselves. A dense layer with such an attribute cannot be replaced by one.
OWN_NAMES = frozenset(
    [
        "first",
        "second",
        "third",
        "whole",
        "place",
        "rank",
        "view",
        "whole_rows",
        "stored_transposed",
        "factors",
        "product",
        "product_of_plain",
        "plain",
        "fill",
        "fill_matrices",
        "matrices",
        "adopt",
        "dense_again",
        "dense_with",
        "plain_module",
        "plain_pair",
        "pivoted",
        "fill_plain",
        "fill_bias",
    ]
)


class FactoredLayer(nn.Module, ABC):
    """The base of all factored layers.

    It offers what a model may read of the dense layer: ``weight``, the product, ``bias``, and by their names the
    attributes of the dense layer, those of a subclass included.
    """

    if TYPE_CHECKING:  # torch.jit.script cannot read annotations of modules
        first: Factor
        second: Factor
    __jit_unused_properties__ = ("factors", "weight", "bias", "pivoted")

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The layers of the product, in the order in which they are applied."""
        return self.first, self.second

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """Multiply ``weights``, one for each of ``factors``, to one matrix a group in the channel view: (g, O, I).

        Differentiable in ``weights``.
        """
        return self.product_of_plain(self.plain(weights))

    @abstractmethod
    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        """Return ``product`` of the weights of plain factors."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the dense weight. It is computed at each access."""

    @property
    def bias(self) -> Tensor | None:
        """The bias, which belongs to the last factor."""
        last = self.factors[-1]
        return last.bias if isinstance(last, nn.Linear | nn.Conv2d | Completion) else None

    @property
    def pivoted(self) -> bool:
        """Whether the second factor holds coefficients of pivots alone."""
        return isinstance(self.factors[-1], Completion)

    def plain(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return ``weights``, one for each of ``factors``, as those of plain factors. Differentiable in ``weights``."""
        last = self.factors[-1]
        return [*weights[:-1], last.plain_weight(weights[-1]) if isinstance(last, Completion) else weights[-1]]

    @torch.no_grad()
    def fill(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """Copy ``weights`` into the factors, in their order, and ``bias`` into the last one, where it has any.

        Raises ``UserError`` where a number is too large for the precision of this layer.
        """
        for factor, weight in zip(self.factors, weights, strict=True):
            factor.weight.copy_(in_precision(weight, factor.weight.dtype))
        self.fill_bias(bias)

    @torch.no_grad()
    def fill_bias(self, bias: Tensor | None) -> None:
        """Copy ``bias`` into the last factor, where both have one."""
        if self.bias is not None and bias is not None:
            self.bias.copy_(in_precision(bias, self.bias.dtype))

    @torch.no_grad()
    def fill_plain(self, weights: Sequence[Tensor]) -> None:
        """Copy the weights of plain factors into the factors, which take their pivots first if they are pivoted."""
        if not isinstance(self.second, Completion):
            self.fill(weights, None)
            return
        A, B = weights
        groups = self.second.groups
        A_gRI = A.t().unsqueeze(0) if isinstance(self.first, nn.Embedding) else A.reshape(groups, self.second.rank, -1)
        self.fill_matrices(factor_matrices(B, groups), A_gRI)

    @torch.no_grad()
    def fill_matrices(self, B_gOR: Tensor, A_gRI: Tensor) -> None:
        """Set the two factors to ``B @ A``, a matrix for each group, and for each subspace within it.

        Raises ``UserError`` for NaN, and where a number is too large for the precision of this layer.
        """
        first, second = self.first, self.second
        if isinstance(second, Completion):
            A_gRI = second.fill(B_gOR, A_gRI)
        else:
            groups = second.groups if isinstance(second, nn.Conv2d) else 1
            # The columns of all subspaces of a group lie side by side.
            B_gOR = B_gOR.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
            kernel_rows = second.kernel_size[0] if isinstance(second, nn.Conv2d) else 1
            weight = factor_weight(B_gOR, kernel_rows).reshape(second.weight.shape)
            second.weight.copy_(in_precision(weight, second.weight.dtype))
        rows = A_gRI.squeeze(0).t() if isinstance(first, nn.Embedding) else A_gRI
        first.weight.copy_(in_precision(rows.reshape(first.weight.shape), first.weight.dtype))

    @torch.no_grad()
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return B and A as ``fill_matrices`` takes them, of plain factors with one matrix a group or subspace."""
        first, last = (factor.weight for factor in self.factors)
        groups = self.second.groups if isinstance(self.second, nn.Conv2d) else 1
        A = first.t() if isinstance(self.first, nn.Embedding) else first
        B_gOR = factor_matrices(last, groups)
        rank: int = vars(self)["rank"]
        B_gOR = B_gOR.unflatten(2, (-1, rank)).transpose(1, 2).flatten(0, 1)
        return B_gOR, A.reshape(len(B_gOR), rank, -1)

    def adopt(self, dense: nn.Module, memo: dict[int, Any] | None = None) -> None:
        """Offer the attributes of ``dense`` and of its class, except those that this layer has itself.

        ``dense``: the dense layer, or another factored layer in its place.
        ``memo``: as for ``copy.deepcopy``; the attributes are then copied with it, otherwise they are shared.
        """
        known = isinstance(dense, FactoredLayer)
        attributes = dense._adopted if known else attributes_of(dense)
        self._adopted = attributes if memo is None else copy.deepcopy(attributes, memo)
        self._adopted_class = dense._adopted_class if known else type(dense)

    @torch.no_grad()
    def dense_again(self) -> nn.Module:
        """Return the dense layer that this one replaced, with the product of the factors as its weight."""
        with exact():
            weight = self.weight
        if weight.ndim == 4 and not self.first.weight.is_contiguous():
            weight = weight.clone(memory_format=torch.channels_last)  # with its strides in dimensions of size 1, too
        bias = None if self.bias is None else nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        return self.dense_with(nn.Parameter(weight, self.first.weight.requires_grad), bias)

    def dense_with(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """Return the dense layer that this one replaced, with these parameters."""
        own: dict[str, Any] = vars(self)
        dense: nn.Module = own["_adopted_class"].__new__(own["_adopted_class"])
        nn.Module.__init__(dense)
        vars(dense).update(own["_adopted"])
        dense.register_parameter("weight", weight)
        if not isinstance(dense, nn.Embedding):
            dense.register_parameter("bias", bias)
        return dense

    def plain_module(self) -> nn.Module:
        """Return modules of torch alone with the same map: the dense layer, where a class says no better.

        They share the parameters of this layer wherever they have the same ones.
        """
        return self.dense_again()

    def plain_pair(self) -> nn.Module:
        """Return the two factors of torch alone, or the dense layer where pivoted factors are smaller than both."""
        if not isinstance(self.second, Completion):
            return nn.Sequential(self.first, self.second)
        second: nn.Module = self.second.plain_module()
        smaller = self.first.weight.numel() + second.get_parameter("weight").numel() < self.weight.numel()
        return nn.Sequential(self.first, second) if smaller else self.dense_again()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = vars(self)
            if name.startswith("__") or "_adopted" not in own:
                raise
            if name in own["_adopted"]:
                return own["_adopted"][name]
            for kind in own["_adopted_class"].__mro__:
                if name in vars(kind) and not any(issubclass(known, kind) for known in dense_kinds()):
                    found = vars(kind)[name]
                    return found.__get__(self, type(self)) if hasattr(found, "__get__") else found
            raise


def linear_of(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """Return a linear layer with these numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad)
    return linear
