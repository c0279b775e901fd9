"""Decompositions into components that are not orthogonal, because the changes of all outputs do not count alike."""

import torch
from torch import Tensor

from spectrim.factored import linalg


def roots(G_OO: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the root of a second moment plus ``damping`` times its mean eigenvalue, and the inverse of that root."""
    values, vectors = torch.linalg.eigh(G_OO)
    root = (values.clamp_min(0) + linalg.floor_of(values, damping)).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def unit(B_OR: Tensor, A_RI: Tensor) -> linalg.SVD:
    """Return ``B A`` as sums of unit vectors, and the sizes of the components."""
    sizes, tiny = (B_OR.norm(dim=-2), A_RI.norm(dim=-1)), torch.finfo(B_OR.dtype).tiny
    left, right = (size.clamp_min(tiny) for size in sizes)
    return linalg.SVD(B_OR / left.unsqueeze(-2), sizes[0] * sizes[1], A_RI / right.unsqueeze(-1))


def error(factors: linalg.SVD) -> Tensor:
    """Return the Frobenius norm of the change of the weight for every rank. Float64 of shape (R + 1,), on the CPU."""
    # The square at rank k sums the inner products of the components that it drops.
    tails = inner_products(factors).flip(-2, -1).cumsum(-1).cumsum(-2).flip(-2, -1)
    squared = tails.diagonal(dim1=-2, dim2=-1).sum(0).clamp_min(0)
    return torch.cat([squared, squared.new_zeros(1)]).sqrt().cpu()


def error_without(factors: linalg.SVD, dropped: list[int]) -> float:
    """Return the Frobenius norm of the sum of the components ``dropped``."""
    U, S, Vh = factors
    squared = inner_products(linalg.SVD(U[..., dropped], S[..., dropped], Vh[..., dropped, :])).sum()
    return float(squared.clamp_min(0).sqrt())


def inner_products(factors: linalg.SVD) -> Tensor:
    """Return the Frobenius inner product of each two components. Shape (g, R, R)."""
    U, S, Vh = (part.double() for part in factors)
    B_OR = U * S.unsqueeze(-2)
    return (B_OR.mT @ B_OR) * (Vh @ Vh.mT)
