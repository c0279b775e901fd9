"""A Linear, Embedding or Conv2d weight as matrices, and the spectrum of such a weight."""

from typing import Literal

from torch import Tensor, nn

from spectrim.decomposers import resumed
from spectrim.decomposers.spectrum import Keep, Spectrum
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.base import Factor, FactoredLayer
from spectrim.factored.dense import DenseLayer
from spectrim.factored.forms import EmbeddingForm, Form, PlainForm
from spectrim.factored.plan import Kept
from spectrim.tools.spill import SpilledTensors, SpillFolder

View = Literal["channel", "spatial"]


class MatrixSpectrum(Spectrum):
    """The spectrum of a weight read as one matrix a group, or as ``subspaces`` matrices a group side by side.

    ``svd``: U (g, O, R), S (g, R), Vh (g, R, I), where g counts all the matrices. U and Vh may lie on disk.
    """

    def __init__(self, layer: DenseLayer, view: View, svd: linalg.SVD, subspaces: int = 1) -> None:
        # Only the shape of the layer is kept: the layer itself would keep every decomposed model alive.
        self.template = layer.without_weights()
        self.view, self.subspaces, self.S_R = view, subspaces, svd.S_R
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

    @property
    def form(self) -> Form:
        """The form of the factored layers, the same at every rank."""
        if isinstance(self.template.module, nn.Embedding):
            return EmbeddingForm()
        return PlainForm(self.template.view(self.view), self.subspaces)

    def kept(self, keep: Keep) -> Kept:
        return Kept(keep, self.form)

    @property
    def break_even(self) -> int:
        return linalg.break_even_rank(*self.shape[1:])

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
        return rank * groups * inputs, rank * groups * outputs

    def factor(self, keep: Keep) -> FactoredLayer:
        chosen = _components(keep, self.max_rank)
        U, S, Vh = self.svd
        root = S[:, chosen].sqrt()  # the two factors share the singular values: equal norms, no overflow in half
        B, A = U[:, :, chosen] * root[:, None, :], root[:, :, None] * Vh[:, chosen, :]
        layer = self.form.layer_for(self.template.module, len(chosen)).to_empty(device=self.device)
        weights = _first_weight(A, layer.first), _second_weight(B, layer.second, self.template.groups)
        layer.fill(weights, self.bias)
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


def _first_weight(A: Tensor, first: Factor) -> Tensor:
    """Return the rows of A (g, rank, I) in the shape of the weight of the first factor."""
    if isinstance(first, nn.Embedding):
        return A.squeeze(0).t()
    return A.reshape(first.weight.shape)


def _second_weight(B: Tensor, second: Factor, groups: int) -> Tensor:
    """Return the columns of B (g, O, rank) in the shape of the weight of the second factor.

    The columns of all subspaces of a group lie side by side.
    """
    B = B.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    if isinstance(second, nn.Conv2d) and second.kernel_size[0] > 1:
        B = B.unflatten(1, (-1, second.kernel_size[0])).transpose(2, 3)
    return B.reshape(second.weight.shape)


def _components(keep: Keep, max_rank: int) -> list[int]:
    chosen = list(range(keep)) if isinstance(keep, int) else sorted(keep)
    if not chosen or chosen[0] < 0 or chosen[-1] >= max_rank or len(set(chosen)) < len(chosen):
        raise UserError(f"keep between 1 and {max_rank} components of this layer, got {keep}")
    return chosen
