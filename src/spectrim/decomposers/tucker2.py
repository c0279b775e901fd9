"""Tucker-2 of a convolution: a basis of its output channels, a basis of its input channels, and a small kernel."""

from bisect import bisect_right
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.decomposers import resumed
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments, Spectrum
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer
from spectrim.factored.forms import TuckerForm
from spectrim.factored.plan import Keep, Kept, rank_of
from spectrim.tools import extras
from spectrim.tools.settings import settings


@settings
class Tucker2:
    """Higher-order SVD of a convolution over its output and input channels (Kim et al., arXiv 1511.06530).

    ``W_oihw = sum_pq U_op V_iq C_pqhw``, with the left singular vectors of the two unfoldings as U and V (De Lathauwer
    et al., SIAM J. Matrix Anal. Appl. 21, 2000). They are computed once, at full rank, and then truncated. The usual
    iteration that refits them at each pair of ranks is left out, so that every rank comes from one decomposition.
    Groups are decomposed one by one and truncated to the same ranks. A Linear and a 1x1 convolution have no kernel to
    keep and are decomposed by plain SVD.

    ``precision``: of the decomposition.
    """

    precision: Literal["float32", "float64"] = "float64"

    samples: ClassVar[int] = 0
    embeddings: ClassVar[bool] = False

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> Spectrum:
        """Decompose ``layer`` and ignore ``moments``. Raises ``UserError`` for a weight with NaN or infinity."""
        if not isinstance(layer, nn.Conv2d) or layer.kernel_size == (1, 1):
            return SVD("channel", self.precision).spectrum(layer)
        dense = DenseLayer.of(layer)
        weight = dense.weight.detach().to(getattr(torch, self.precision))
        linalg.require_finite(weight)
        groups = [higher_order_svd(one) for one in weight.unflatten(0, (dense.groups, -1))]
        return Tucker2Spectrum(dense, Tucker(*(torch.stack(part) for part in zip(*groups, strict=True))))


class Tucker(NamedTuple):
    """``W_goihw = sum_pq U_gop V_giq C_gpqhw`` with orthonormal columns in U and V."""

    C_PQHW: Tensor
    U_OP: Tensor
    V_IQ: Tensor


def higher_order_svd(W_OIHW: Tensor) -> Tucker:
    """Return Tucker-2 of one weight (O, I, kh, kw) at full rank: P = min(O, I*kh*kw) and Q = min(I, O*kh*kw)."""
    extras.imported("tensorly", "tucker", "Tucker2")
    import tensorly  # here, because its import takes a third of a second
    from tensorly.decomposition import partial_tucker

    outputs, inputs = W_OIHW.shape[:2]
    ranks = [min(size, W_OIHW.numel() // size) for size in (outputs, inputs)]
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (C, (U, V)), _ = partial_tucker(W_OIHW, rank=ranks, modes=[0, 1], n_iter_max=0, svd=_svd)
    return Tucker(C, U, V)


def _svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> linalg.SVD:
    """Call ``resumed.svd``, which has a fallback, in the way in which tensorly calls an SVD."""
    U, S, Vh = resumed.svd(matrix)
    return linalg.SVD(U[:, :n_eigenvecs], S[:n_eigenvecs], Vh[:n_eigenvecs])


class Tucker2Spectrum(Spectrum):
    """All ranks of one convolution. Rank k keeps ``ranks[k] = (p, q)`` output and input directions, p + q = k + 1.

    From full rank, one direction is dropped at a time, down to (1, 1). It is dropped on the side that loses less of the
    squared norm of the weight for each parameter saved. Component k is the difference between rank k and rank k - 1:
    one row C[p, :q] or one column C[:p, q] of the core C. Components share no entry of C, so they are orthogonal, and
    squared norms and inner products add up over them as for an SVD. But only the leading k of them make a layer.
    """

    def __init__(self, layer: DenseLayer, tucker: Tucker) -> None:
        self.template, self.tucker = layer.without_weights(), tucker
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.device = layer.weight.device
        energy_PQ = tucker.C_PQHW.square().sum((0, 3, 4))
        self.ranks = [(0, 0), *_schedule(energy_PQ, *self._shape()[1:])]
        self.energy_R = self._by_component(energy_PQ)
        self.costs = [self.cost(rank) for rank in range(len(self.ranks))]
        self._largest: Tensor | None = None

    @property
    def max_rank(self) -> int:
        return len(self.ranks) - 1

    @property
    def break_even(self) -> int:
        return max(0, self.rank_within(self.template.weight.numel() - 1))

    def error(self) -> Tensor:
        return linalg.tail_sums(self.energy_R).sqrt()

    def first_order(self, gradient: Tensor) -> Tensor:
        C, U, V = self.tucker
        G = gradient.to(C).unflatten(0, (len(C), -1))
        product = C * torch.einsum("goihw,gop,giq->gpqhw", G, U, V)
        return -linalg.tail_sums(self._by_component(product.sum((0, 3, 4))))

    def largest_entry(self) -> Tensor:
        # Built up from the last component, one update a rank: about as many operations as the decomposition.
        if self._largest is None:
            C, U, V = self.tucker
            C = C.flatten(3)
            change = torch.zeros(len(C), U.shape[1], V.shape[1], C.shape[3], dtype=C.dtype, device=C.device)
            largest = torch.zeros(len(self.ranks), dtype=torch.float64)
            for rank in range(self.max_rank, 0, -1):
                p, q = self.ranks[rank]
                if p > self.ranks[rank - 1][0]:
                    row = torch.einsum("gqx,giq->gix", C[:, p - 1, :q], V[:, :, :q])
                    change += U[:, :, p - 1, None, None] * row.unsqueeze(1)
                else:
                    column = torch.einsum("gpx,gop->gox", C[:, :p, q - 1], U[:, :, :p])
                    change += column.unsqueeze(2) * V[:, None, :, q - 1, None]
                largest[rank - 1] = change.abs().max()
            self._largest = largest
        return self._largest

    def sizes(self, rank: int) -> tuple[int, ...]:
        p, q = self.ranks[rank]
        groups, outputs, inputs, kernel = self._shape()
        return groups * inputs * q, groups * p * q * kernel, groups * outputs * p

    def rank_within(self, params: float) -> int:
        return bisect_right(self.costs, params) - 1

    def kept(self, keep: Keep) -> Kept:
        return Kept(keep, TuckerForm(*self.ranks[self._leading(keep)]))

    def factor(self, keep: Keep) -> FactoredLayer:
        rank = self._leading(keep)
        p, q = self.ranks[rank]
        C, U, V = self.tucker
        layer = TuckerForm(p, q).layer_for(self.template.module, rank).to_empty(device=self.device)
        weights = V[:, :, :q].transpose(1, 2), C[:, :p, :q], U[:, :, :p]
        layer.fill(
            [w.reshape(factor.weight.shape) for w, factor in zip(weights, layer.factors, strict=True)], self.bias
        )
        return layer

    def _leading(self, keep: Keep) -> int:
        rank = rank_of(keep)
        if not isinstance(keep, int) and sorted(keep) != list(range(rank)):
            raise UserError("a Tucker decomposition keeps its leading components only; give a rank, not indices")
        if not 1 <= rank <= self.max_rank:
            raise UserError(f"keep between 1 and {self.max_rank} components of this layer, got {keep}")
        return rank

    def _shape(self) -> tuple[int, int, int, int]:
        """Return the number of groups, the outputs and inputs of each, and the entries of the kernel."""
        C, U, V = self.tucker
        return len(C), U.shape[1], V.shape[1], C.shape[3] * C.shape[4]

    def _by_component(self, values_PQ: Tensor) -> Tensor:
        """Sum values on the entries of the core over each component. Shape (P, Q) to (R,), on the CPU."""
        rows, columns = (values_PQ.double().cumsum(dim).tolist() for dim in (1, 0))
        sums = []
        for (before, _), (p, q) in zip(self.ranks, self.ranks[1:], strict=False):
            sums.append(rows[p - 1][q - 1] if p > before else columns[p - 1][q - 1])
        return torch.tensor(sums, dtype=torch.float64)


def _schedule(energy_PQ: Tensor, outputs: int, inputs: int, kernel: int) -> list[tuple[int, int]]:
    """Return the pairs (p, q) of all ranks, from (1, 1) to the shape of the core.

    ``energy_PQ``: the squares of the core, summed over the kernel.
    """
    rows, columns = (energy_PQ.double().cumsum(dim).tolist() for dim in (1, 0))
    p, q = energy_PQ.shape
    pairs = [(p, q)]
    while (p, q) != (1, 1):
        row = rows[p - 1][q - 1] / (outputs + q * kernel) if p > 1 else inf
        column = columns[p - 1][q - 1] / (inputs + p * kernel) if q > 1 else inf
        p, q = (p - 1, q) if row <= column else (p, q - 1)
        pairs.append((p, q))
    return pairs[::-1]
