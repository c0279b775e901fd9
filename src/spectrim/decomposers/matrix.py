"""A Linear, Embedding or Conv2d weight as matrices, and the spectrum of such a weight."""

import copy
from bisect import bisect_right
from typing import Literal, Self

from torch import Tensor, nn

from spectrim.decomposers import resumed
from spectrim.decomposers.spectrum import Spectrum
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer
from spectrim.factored.forms import EmbeddingForm, Form, PivotedForm, PlainForm
from spectrim.factored.plan import Keep, Kept, rank_of
from spectrim.tools.spill import SpilledTensors, SpillFolder

View = Literal["channel", "spatial"]
Factors = Literal["plain", "pivoted"]


class MatrixSpectrum(Spectrum):
    """The spectrum of a weight read as one matrix a group, or as ``subspaces`` matrices a group side by side.

    ``svd``: U (g, O, R), S (g, R), Vh (g, R, I), where g counts all the matrices. U and Vh may lie on disk.
    ``factors``: what the factored layers store. ``plain``: two factors of k (O + I) numbers at rank k. ``pivoted``: k
        rows of the product and the coefficients of the other rows in them, k (O + I - k) numbers.
    """

    def __init__(
        self, layer: DenseLayer, view: View, svd: linalg.SVD, subspaces: int = 1, factors: Factors = "plain"
    ) -> None:
        # Only the shape of the layer is kept: the layer itself would keep every decomposed model alive.
        self.template = layer.without_weights()
        self.view, self.subspaces, self.S_R, self.pivoted = view, subspaces, svd.S_R, factors == "pivoted"
        self.shape = (*svd.U_OR.shape[:2], svd.Vh_RI.shape[-1])  # matrices, outputs and inputs of each
        self._vectors: tuple[Tensor, Tensor] | SpilledTensors = (svd.U_OR, svd.Vh_RI)
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.device = layer.weight.device
        self._largest: Tensor | None = None

    @property
    def svd(self) -> linalg.SVD:
        """The decomposition, from memory, or read from disk at each access."""
        if not isinstance(self._vectors, SpilledTensors):
            return linalg.SVD(self._vectors[0], self.S_R, self._vectors[1])
        read = self._vectors.read()
        return linalg.SVD(read["U"].to(self.device), self.S_R, read["Vh"].to(self.device))

    def spill(self, folder: SpillFolder) -> None:
        if not isinstance(self._vectors, SpilledTensors):
            self._vectors = folder.write(dict(zip(("U", "Vh"), self._vectors, strict=True)))

    @property
    def importance(self) -> Tensor:
        """The values that order the components, in falling order. Shape (g, R)."""
        return self.S_R

    @property
    def max_rank(self) -> int:
        return self.S_R.shape[-1]

    def form(self, rank: int) -> Form:
        """Return the form of the factored layer of ``rank``."""
        pivoted = self.is_pivoted(rank)
        if isinstance(self.template.module, nn.Embedding):
            return EmbeddingForm(pivoted=pivoted)
        view = self.template.view(self.view)
        return PivotedForm(view) if pivoted else PlainForm(view, self.subspaces)

    def is_pivoted(self, rank: int) -> bool:
        """Return whether the factors of ``rank`` are pivoted: at full rank no row may be left for the coefficients."""
        return self.pivoted and rank <= linalg.most_pivots(*self.shape[1:])

    def plain(self) -> Self:
        """Return the same spectrum with plain factors, which exist at every rank up to the full one."""
        twin = copy.copy(self)
        twin.pivoted = False
        return twin

    def kept(self, keep: Keep) -> Kept:
        return Kept(keep, self.form(rank_of(keep)))

    @property
    def break_even(self) -> int:
        _, outputs, inputs = self.shape
        return linalg.break_even_rank(outputs, inputs, self.pivoted)

    def error(self) -> Tensor:
        energy = linalg.tail_sums(self.S_R.double().square()).sum(0)
        return energy.sqrt().cpu()

    def largest_entry(self) -> Tensor:
        if self._largest is None:
            self._largest = resumed.largest_entry_of_error(self.svd)
        return self._largest

    def first_order(self, gradient: Tensor) -> Tensor:
        G = to_matrix(gradient, self.template, self.view, self.subspaces).to(self.S_R)
        return linalg.first_order_change(self.svd, G).double().sum(0).cpu()

    def sizes(self, rank: int) -> tuple[int, ...]:
        groups, outputs, inputs = self.shape
        first, second = linalg.factor_sizes(outputs, inputs, rank, self.is_pivoted(rank))
        return groups * first, groups * second

    def multiplied(self, rank: int) -> tuple[int, ...]:
        """Return ``sizes``, but those of plain factors for a convolution, where pivots save no multiplication."""
        return self.plain().sizes(rank) if isinstance(self.template.module, nn.Conv2d) else self.sizes(rank)

    def rank_within(self, params: float) -> int:
        if not self.pivoted:
            return super().rank_within(params)
        return max(0, bisect_right(range(self.max_rank + 1), params, key=self.cost) - 1)

    def factor(self, keep: Keep) -> FactoredLayer:
        chosen = _components(keep, self.max_rank)
        U, S, Vh = self.svd
        root = S[:, chosen].sqrt()  # the two factors share the singular values: equal norms, no overflow in half
        B, A = U[:, :, chosen] * root[:, None, :], root[:, :, None] * Vh[:, chosen, :]
        layer = self.form(len(chosen)).layer_for(self.template.module, len(chosen)).to_empty(device=self.device)
        layer.fill_matrices(B, A)
        layer.fill_bias(self.bias)
        return layer


def to_matrix(weight: Tensor, layer: DenseLayer, view: str, subspaces: int = 1) -> Tensor:
    """Read a weight of ``layer``, or its gradient, as matrices (g, O, I) in one of the views of ``SVD``.

    A Linear and an Embedding have g = 1. With ``subspaces``, the matrix of each group is split along its input channels
    into as many parts, and g counts all of them.
    """
    if layer.stored_transposed:
        weight = weight.t()
    groups, (outputs, inputs, *kernel) = layer.groups, weight.shape
    split = weight.reshape(groups, outputs // groups, subspaces, inputs // subspaces, *kernel)
    blocks = split.transpose(1, 2).flatten(0, 1)
    if weight.ndim == 2 or view == "channel":
        return blocks.flatten(2)
    return blocks.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def from_matrix(W_OI: Tensor, layer: DenseLayer, view: str) -> Tensor:
    """Turn matrices (g, O, I) into a weight of ``layer``: the inverse of ``to_matrix`` without subspaces."""
    if layer.weight.ndim == 2:
        W_OI = W_OI.squeeze(0)
        return W_OI.t() if layer.stored_transposed else W_OI
    kh, kw = layer.kernel
    if view == "spatial":
        rows = layer.outputs // layer.groups
        W_OI = W_OI.reshape(layer.groups, rows, kh, layer.inputs, kw).permute(0, 1, 3, 2, 4)
    return W_OI.reshape(layer.outputs, layer.inputs, kh, kw)


def _components(keep: Keep, max_rank: int) -> list[int]:
    chosen = list(range(keep)) if isinstance(keep, int) else sorted(keep)
    if not chosen or chosen[0] < 0 or chosen[-1] >= max_rank or len(set(chosen)) < len(chosen):
        raise UserError(f"keep between 1 and {max_rank} components of this layer, got {keep}")
    return chosen
