"""A Linear, Embedding or Conv2d weight as matrices, and the spectrum of such a weight."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from spectrim.decomposers.spectrum import Keep, Spectrum
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.layers import (
    dense_kinds,
    is_linear,
    is_stored_transposed,
    shaped_like,
    subspace_form,
    transposed,
)
from spectrim.tools.spill import Laid, Shelf

View = Literal["channel", "spatial"]


class MatrixSpectrum(Spectrum):
    """The spectrum of a weight seen as one matrix a group, or as ``subspaces`` matrices a group side by side.

    ``factors``: U (g, O, R), S (g, R), Vh (g, R, I), where g counts all the matrices. U and Vh may lie on a shelf.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, view: View, factors: linalg.SVD, subspaces: int = 1) -> None:
        # Only the shape of the layer is kept: holding the layer itself would keep every decomposed model alive.
        self.template = without_weights(layer)
        self.view, self.subspaces, self.S_R = view, subspaces, factors.S_R
        self.shape = (*factors.U_OR.shape[:2], factors.Vh_RI.shape[-1])  # matrices, outputs and inputs of each
        self._vectors: tuple[Tensor, Tensor] | Laid = (factors.U_OR, factors.Vh_RI)
        bias = getattr(layer, "bias", None)  # an embedding has none
        self.bias = None if bias is None else bias.detach().clone()
        self.device = layer.weight.device
        self._largest: Tensor | None = None

    @property
    def factors(self) -> linalg.SVD:
        """From memory, or read from the shelf at each call."""
        if not isinstance(self._vectors, Laid):
            return linalg.SVD(self._vectors[0], self.S_R, self._vectors[1])
        read = self._vectors.read()
        return linalg.SVD(read["U"].to(self.device), self.S_R, read["Vh"].to(self.device))

    def lay_aside(self, shelf: Shelf) -> None:
        if not isinstance(self._vectors, Laid):
            self._vectors = shelf.lay(dict(zip(("U", "Vh"), self._vectors, strict=True)))

    @property
    def importance(self) -> Tensor:
        """What the components are ordered by, falling. Shape (g, R)."""
        return self.S_R

    @property
    def max_rank(self) -> int:
        return self.S_R.shape[-1]

    @property
    def form(self) -> str:
        return subspace_form(form_of(self.template, self.view), self.subspaces)

    @property
    def break_even(self) -> int:
        return linalg.break_even_rank(*self.shape[1:])

    def error(self) -> Tensor:
        energy = linalg.tail_sums(self.S_R.double().square()).sum(0)
        return energy.sqrt().cpu()

    def largest_entry(self) -> Tensor:
        if self._largest is None:
            self._largest = linalg.largest_entry_of_error(self.factors).double().cpu()
        return self._largest

    def first_order(self, gradient: Tensor) -> Tensor:
        G = to_matrix(gradient, self.template, self.view, self.subspaces).to(self.S_R)
        return linalg.first_order_change(self.factors, G).double().sum(0).cpu()

    def sizes(self, rank: int) -> tuple[int, ...]:
        groups, outputs, inputs = self.shape
        return rank * groups * inputs, rank * groups * outputs

    def factor(self, keep: Keep) -> nn.Module:
        chosen = _components(keep, self.max_rank)
        U, S, Vh = self.factors
        root = S[:, chosen].sqrt()  # the two factors share the singular values: equal norms, no overflow in half
        B, A = U[:, :, chosen] * root[:, None, :], root[:, :, None] * Vh[:, chosen, :]
        layer: Any = shaped_like(self.template, len(chosen), self.form).to_empty(device=self.device)
        with torch.no_grad():
            layer.first.weight.copy_(first_weight(A, layer.first))
            layer.second.weight.copy_(second_weight(B, layer.second, self.template))
            if self.bias is not None:
                layer.second.bias.copy_(self.bias)
        return layer


def form_of(layer: nn.Module, view: View) -> str:
    """The form of the factors of ``layer``: a Linear and an embedding have one each, a convolution that of the view."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "linear" if is_linear(layer) else view


def to_matrix(weight: Tensor, layer: nn.Linear | nn.Conv2d, view: View, subspaces: int = 1) -> Tensor:
    """A weight (or its gradient) as matrices (g, O, I): the views of a convolution as in ``SVD``.

    A Linear has g = 1, and an embedding too: its I inputs are the ids, one of which is 1 at a position, the others 0.

    With ``subspaces`` g counts each of them: the matrix of a group, cut into that many along its input channels.
    """
    if is_stored_transposed(layer):
        weight = weight.t()
    groups, (outputs, inputs, *kernel) = getattr(layer, "groups", 1), weight.shape
    split = weight.reshape(groups, outputs // groups, subspaces, inputs // subspaces, *kernel)
    blocks = split.transpose(1, 2).flatten(0, 1)
    if weight.ndim == 2 or view == "channel":
        return blocks.flatten(2)
    return blocks.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def from_matrix(W_OI: Tensor, layer: nn.Linear | nn.Conv2d, view: View) -> Tensor:
    """The inverse of ``to_matrix``: matrices (g, O, I) as a weight of ``layer``."""
    if is_stored_transposed(layer):
        return W_OI.squeeze(0).t()
    if isinstance(layer, nn.Linear):
        return W_OI.squeeze(0)
    shape = outputs, inputs, kh, kw = layer.weight.shape
    if view == "spatial":
        W_OI = W_OI.reshape(layer.groups, outputs // layer.groups, kh, inputs, kw).permute(0, 1, 3, 2, 4)
    return W_OI.reshape(shape)


def first_weight(A: Tensor, first: nn.Module) -> Tensor:
    """Rows of A (g, rank, I) as the weight of the first layer."""
    if isinstance(first, nn.Embedding):
        return A.squeeze(0).t()
    return A.reshape(cast(Tensor, first.weight).shape)


def second_weight(B: Tensor, second: nn.Module, dense: nn.Linear | nn.Conv2d) -> Tensor:
    """Columns of B (g, O, rank) as the weight of the second layer: those of a group's subspaces side by side."""
    groups = getattr(dense, "groups", 1)
    B = B.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    if isinstance(second, nn.Conv2d) and second.kernel_size[0] > 1:
        B = B.unflatten(1, (-1, second.kernel_size[0])).transpose(2, 3)
    return B.reshape(cast(Tensor, second.weight).shape)


def _components(keep: Keep, max_rank: int) -> list[int]:
    chosen = list(range(keep)) if isinstance(keep, int) else sorted(keep)
    if not chosen or chosen[0] < 0 or chosen[-1] >= max_rank or len(set(chosen)) < len(chosen):
        raise UserError(f"keep between 1 and {max_rank} components of this layer, got {keep}")
    return chosen


def checked(layer: nn.Module) -> nn.Linear | nn.Conv2d:
    """``layer`` itself. Raises ``UserError`` for a kind of layer that is not seen as a matrix."""
    if not isinstance(layer, dense_kinds()):
        raise UserError(f"a decomposition factors nn.Linear, nn.Conv2d and nn.Embedding, not {type(layer).__name__}")
    return cast(nn.Linear | nn.Conv2d, layer)


def without_weights(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """A layer of the same settings on the meta device."""
    if isinstance(layer, transposed()):
        inputs, outputs = layer.weight.shape
        with torch.device("meta"):
            return cast(Any, type(layer))(outputs, inputs).to(layer.weight.dtype)
    if isinstance(layer, nn.Embedding):
        with torch.device("meta"):
            rows, width = layer.weight.shape
            return cast(Any, nn.Embedding(rows, width, dtype=layer.weight.dtype))
    if isinstance(layer, nn.Linear):
        bias, dtype = layer.bias is not None, layer.weight.dtype
        return nn.Linear(layer.in_features, layer.out_features, bias, device="meta", dtype=dtype)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
        device="meta",
        dtype=layer.weight.dtype,
    )
