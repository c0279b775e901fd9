"""The mathematics on matrices: one SVD gives the error and the first-order change of every rank.

Shape suffixes: O outputs, I inputs, R = min(O, I) singular components. Leading dimensions ``...`` are groups. A curve
has R + 1 entries. Entry k belongs to rank k: nothing is kept at 0, everything at R.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from spectrim.errors import UserError


class SVD(NamedTuple):
    """``W_OI = U_OR @ diag(S_R) @ Vh_RI``, with singular values in falling order."""

    U_OR: Tensor
    S_R: Tensor
    Vh_RI: Tensor


def svd(W_OI: Tensor) -> SVD:
    """Return the reduced SVD of one matrix or of a batch ``(..., O, I)``, in the precision of ``W_OI``.

    LAPACK's divide and conquer may fail to converge on matrices that its slower QR iteration (gesvd) handles. QR
    iteration in float64 is the fallback.

    Raises ``UserError`` where the matrix holds NaN or infinity.
    """
    require_finite(W_OI)
    try:
        return SVD(*torch.linalg.svd(W_OI, full_matrices=False))
    except torch.linalg.LinAlgError:
        return _svd_by_qr_iteration(W_OI)


def require_finite(weight: Tensor) -> None:
    """Raise ``UserError`` where ``weight`` holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise UserError("a weight holds NaN or infinity; repair the checkpoint before compressing it")


def in_precision(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``value`` in the precision ``dtype``.

    Raises ``UserError`` where it is float16 and a number does not fit: the largest is 65,504, that of bfloat16 3e38.
    """
    rounded = value.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(rounded).all():
        raise UserError("a number is NaN or too large for float16; use bfloat16 or float32")
    return rounded


def require_finite_moment(C: Tensor) -> None:
    """Raise ``UserError`` where a second moment of the inputs of a layer holds NaN or infinity."""
    if not torch.isfinite(C).all():
        raise UserError(
            "the inputs of a layer hold NaN or infinity; check the model's weights and the calibration data"
        )


def _svd_by_qr_iteration(W_OI: Tensor) -> SVD:
    flat = W_OI.reshape(-1, *W_OI.shape[-2:]).double().cpu().numpy()
    parts = zip(*(scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd") for matrix in flat), strict=True)
    U, S, Vh = (torch.from_numpy(np.stack(part)).to(W_OI) for part in parts)
    batch = W_OI.shape[:-2]
    return SVD(U.reshape(*batch, *U.shape[-2:]), S.reshape(*batch, -1), Vh.reshape(*batch, *Vh.shape[-2:]))


def whitened(W_OI: Tensor, C: Tensor, ridge: float) -> Tensor:
    """Return ``W C^(1/2)``.

    ``C``: a second moment of shape (..., I, I), or only its diagonal, shape (..., I).
    ``ridge``: as in ``square_root``. Raises ``UserError`` as ``square_root`` does.
    """
    if C.ndim == W_OI.ndim:
        return W_OI @ square_root(C, ridge)
    return W_OI * (C + floor_of(C, ridge)).sqrt().unsqueeze(-2)


def square_root(C_II: Tensor, ridge: float) -> Tensor:
    """Return the symmetric root of a second moment plus ``ridge`` times its mean eigenvalue. Shape (..., I, I).

    Raises ``UserError`` where the moment holds NaN or infinity.
    """
    require_finite_moment(C_II)
    values, vectors = torch.linalg.eigh(C_II)
    root = (values.clamp_min(0) + floor_of(values, ridge)).sqrt()
    return (vectors * root.unsqueeze(-2)) @ vectors.transpose(-1, -2)


def floor_of(values: Tensor, ridge: float) -> Tensor:
    """Return ``ridge`` times the mean eigenvalue, or ``ridge`` if that is 0, as for inputs that are always zero.

    ``values``: the eigenvalues of a second moment or, with the same mean, its diagonal. Shape (..., I) to (..., 1).
    """
    mean = values.mean(-1, keepdim=True)
    return ridge * torch.where(mean > 0, mean, 1.0)


def tail_sums(values_R: Tensor) -> Tensor:
    """Sum the values that rank k drops, for every k: entry k is the sum over i > k. Shape (..., R) to (..., R + 1)."""
    sums = values_R.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, torch.zeros_like(sums[..., :1])], -1)


def gate_gradient(factors: SVD, G_OI: Tensor) -> Tensor:
    """Return ``c_i = sigma_i * u_i^T G v_i``, the derivative of the loss by a gate on component i. Shape (..., R)."""
    return factors.S_R * torch.einsum("...or,...oi,...ri->...r", factors.U_OR, G_OI, factors.Vh_RI)


def first_order_change(factors: SVD, G_OI: Tensor) -> Tensor:
    """Return ``<G, W_k - W>`` for every rank k: the total differential of the loss (S1, Lemma 1) along a truncation.

    It equals minus the tail sum of the gate gradients.

    ``G_OI``: the gradient of the loss by ``W_OI``.
    """
    return -tail_sums(gate_gradient(factors, G_OI))


def largest_entry_of_error(factors: SVD) -> Tensor:
    """Return ``max |W_k - W|`` over all entries and groups, for every rank k. Shape (R + 1,).

    The difference is built up from the smallest component by one rank-one update a rank. This takes as many operations
    as the SVD itself.
    """
    U, S, Vh = (part.reshape(-1, *part.shape[-dims:]) for part, dims in zip(factors, (2, 1, 2), strict=True))
    difference = torch.zeros(U.shape[0], U.shape[1], Vh.shape[2], dtype=U.dtype, device=U.device)
    largest = torch.zeros(S.shape[-1] + 1, dtype=U.dtype, device=U.device)
    for i in range(S.shape[-1] - 1, -1, -1):
        difference.baddbmm_(U[:, :, i : i + 1] * S[:, i].view(-1, 1, 1), Vh[:, i : i + 1, :])
        largest[i] = difference.abs().max()
    return largest


def break_even_rank(outputs: int, inputs: int, pivoted: bool = False) -> int:
    """Return the largest rank at which the factors hold fewer numbers than W.

    Two plain factors do so for ``k < O*I / (O + I)``, ``pivoted`` ones at every rank below the full one.
    """
    return min(outputs, inputs) - 1 if pivoted else -(-outputs * inputs // (outputs + inputs)) - 1


def factor_sizes(outputs: int, inputs: int, rank: int, pivoted: bool = False) -> tuple[int, int]:
    """Return how many numbers each factor of ``rank`` holds: ``pivoted`` ones have no row for a pivot in the second."""
    return rank * inputs, rank * (outputs - rank if pivoted else outputs)


def most_pivots(outputs: int, inputs: int) -> int:
    """Return the largest rank that pivots and coefficients of the other rows can hold: some row is no pivot."""
    return min(outputs - 1, inputs)


def stable_rank(S_R: Tensor) -> Tensor:
    """Return ``sum sigma^2 / sigma_1^2``, between 1 and the rank; 0 for a zero matrix. Shape (..., R) to (...)."""
    return S_R.square().sum(-1) / S_R[..., 0].square().clamp_min(torch.finfo(S_R.dtype).tiny)


def nuclear(S_R: Tensor) -> Tensor:
    """Return ``||sigma||_1``. Shape (..., R) to (...)."""
    return S_R.abs().sum(-1)


def hoyer(S_R: Tensor) -> Tensor:
    """Return ``||sigma||_1 / ||sigma||_2`` (S2): 1 for a single component, sqrt(R) for a flat spectrum."""
    return S_R.abs().sum(-1) / S_R.norm(dim=-1).clamp_min(torch.finfo(S_R.dtype).tiny)


def orthogonality(factors: SVD) -> Tensor:
    """Return ``(||U^T U - 1||_F^2 + ||V^T V - 1||_F^2) / R^2``, summed over groups (Yang et al., arXiv 2004.09031)."""
    rank = factors.S_R.shape[-1]
    eye = torch.eye(rank, dtype=factors.S_R.dtype, device=factors.S_R.device)
    of_U = factors.U_OR.transpose(-1, -2) @ factors.U_OR - eye
    of_V = factors.Vh_RI @ factors.Vh_RI.transpose(-1, -2) - eye
    return (of_U.square().sum() + of_V.square().sum()) / rank**2


def orthogonalised(factors: SVD) -> SVD:
    """Return the SVD of ``U diag(S) Vh`` for any U, S and Vh of R components, in float64, without forming the product.

    It takes the QR decomposition of U and of V, then the SVD of the R x R core between them.

    Raises ``UserError`` for NaN or infinity.
    """
    U, S, Vh = (part.double() for part in factors)
    Q_OR, of_U = torch.linalg.qr(U)
    Q_IR, of_V = torch.linalg.qr(Vh.transpose(-1, -2))
    core = svd((of_U * S.unsqueeze(-2)) @ of_V.transpose(-1, -2))
    return SVD(Q_OR @ core.U_OR, core.S_R, core.Vh_RI @ Q_IR.transpose(-1, -2))


def carried(velocity: SVD, before: SVD, after: SVD) -> SVD:
    """Transfer the velocity of ``before`` to ``after``, its orthogonalised form, so that the matrix moves as before.

    With ``U' = U T`` and ``V' = V Q`` the new velocities are exactly ``dU T`` and ``dV Q``. The velocity of S,
    ``T^-1 dS Q^-T``, need not be diagonal, and only its diagonal is kept. In float64.
    """
    U, _, Vh = (part.double() for part in before)
    dU, dS, dVh = (part.double() for part in velocity)
    T, Q = (torch.linalg.lstsq(one, other).solution for one, other in ((U, after.U_OR), (Vh.mT, after.Vh_RI.mT)))
    back = after.U_OR.mT @ U, Vh @ after.Vh_RI.mT
    return SVD(dU @ T, torch.einsum("...ij,...j,...ji->...i", back[0], dS, back[1]), (dVh.mT @ Q).mT)
