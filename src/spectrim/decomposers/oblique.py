"""Decompositions into components that are not orthogonal, because the changes of all outputs do not count alike."""

import torch
from torch import Tensor

from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.factored import linalg
from spectrim.factored.plan import Keep


def roots(G_OO: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the root of a second moment plus ``damping`` times its mean eigenvalue, and the inverse of that root."""
    values, vectors = torch.linalg.eigh(G_OO)
    root = (values.clamp_min(0) + linalg.floor_of(values, damping)).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def triangular_root(G_OO: Tensor, damping: float) -> Tensor:
    """Return R, upper triangular, with ``R^T R = G + damping * mean eigenvalue``. Shape (..., O, O).

    It is an orthogonal matrix times the symmetric root, and takes a tenth of its time.
    """
    floor = linalg.floor_of(G_OO.diagonal(dim1=-2, dim2=-1), damping)
    R_OO, failed = torch.linalg.cholesky_ex(G_OO + torch.diag_embed(floor.expand(G_OO.shape[:-1])), upper=True)
    return roots(G_OO, damping)[0] if failed.any() else R_OO  # rounding may make a moment indefinite


def unit(B_OR: Tensor, A_RI: Tensor) -> linalg.SVD:
    """Return ``B A`` as sums of unit vectors, and the sizes of the components."""
    sizes, tiny = (B_OR.norm(dim=-2), A_RI.norm(dim=-1)), torch.finfo(B_OR.dtype).tiny
    left, right = (size.clamp_min(tiny) for size in sizes)
    return linalg.SVD(B_OR / left.unsqueeze(-2), sizes[0] * sizes[1], A_RI / right.unsqueeze(-1))


class ObliqueSpectrum(MatrixSpectrum):
    """A spectrum whose squared errors do not add up over the components, as these are not orthogonal."""

    _error: Tensor | None = None

    def error(self) -> Tensor:
        if self._error is None:
            # The square at rank k sums the inner products of the components that it drops.
            tails = _inner_products(self.svd).flip(-2, -1).cumsum(-1).cumsum(-2).flip(-2, -1)
            squared = tails.diagonal(dim1=-2, dim2=-1).sum(0).clamp_min(0)
            self._error = torch.cat([squared, squared.new_zeros(1)]).sqrt().cpu()
        return self._error

    def relative_error_at(self, keep: Keep) -> float:
        if isinstance(keep, int):
            return float(self.relative_error()[keep])
        dropped = sorted(set(range(self.max_rank)) - set(keep))
        U, S, Vh = self.svd
        squared = _inner_products(linalg.SVD(U[..., dropped], S[..., dropped], Vh[..., dropped, :])).sum()
        return float(squared.clamp_min(0).sqrt()) / float(self.norm.clamp_min(1e-300))


def _inner_products(factors: linalg.SVD) -> Tensor:
    """Return the Frobenius inner product of each two components. Shape (g, R, R)."""
    U, S, Vh = (part.double() for part in factors)
    B_OR = U * S.unsqueeze(-2)
    return (B_OR.mT @ B_OR) * (Vh @ Vh.mT)
