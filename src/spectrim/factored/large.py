"""Large matrices decomposed by the eigenvectors of their smaller Gram matrix, which cost less than an SVD.

A Gram matrix has the squares of the singular values, so it holds half of their digits. In float64 it tells singular
values apart down to about 1e-8 of the largest. Each function says what that loses and where it is refused.

Shape suffixes as in ``linalg``, and S for the smaller side, M for the larger.
"""

from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

from spectrim.factored import linalg
from spectrim.factored.linalg import SVD, require_finite

LARGE = 2048  # rows and columns; smaller matrices are decomposed by LAPACK's SVD, as the published numbers were
WHITENED = 512  # rows and columns of a whitened one; it gains more, because no root of a moment is taken
SMALLEST = 1e-5  # of the largest singular value: below it the vectors of the larger side are not orthogonal enough
BLOCK_BYTES, BLOCK_ROWS = 1 << 21, 64  # size of the blocks that a large matrix is multiplied in, and their least rows


def svd(W_OI: Tensor) -> SVD:
    """Return ``linalg.svd``. A matrix in float64 with at least ``LARGE`` rows and columns takes two thirds of its time.

    It then comes from the eigenvectors of the smaller Gram matrix. At 4,096 rows and columns that took 29 s of one
    core, and LAPACK's SVD 44 s. ``W = U diag(S) Vh`` holds to rounding, and the vectors of the smaller side are
    orthonormal to rounding. The tail energies of S are the errors of its truncations. Two things are lost, with
    e = 2.2e-16, the precision of float64:

    - The squared error of rank k is above the least possible one, by at most ``10 R e sigma_1^2``.
    - Two vectors i and j of the larger side have a scalar product of up to ``10 e sigma_1^2 / (sigma_i sigma_j)``.

    So a matrix with a singular value below ``SMALLEST`` of the largest is refused: LAPACK's SVD decomposes it.

    Raises ``UserError`` where the matrix holds NaN or infinity.
    """
    if not _is_large(W_OI, LARGE):
        return linalg.svd(W_OI)
    require_finite(W_OI)
    wide = W_OI.shape[-2] < W_OI.shape[-1]
    tall = W_OI.mT if wide else W_OI
    try:
        _, V_SR = torch.linalg.eigh(tall.mT @ tall)
    except torch.linalg.LinAlgError:
        return linalg.svd(W_OI)
    US_MR = tall @ V_SR
    S_R, order = US_MR.norm(dim=-2).sort(descending=True, stable=True)
    if not (S_R[..., -1] >= SMALLEST * S_R[..., 0]).all() or not S_R[..., -1].all():
        return linalg.svd(W_OI)
    U_MR, V_SR = (part.gather(-1, order.unsqueeze(-2).expand_as(part)) for part in (US_MR, V_SR))
    U_MR /= S_R.unsqueeze(-2)
    return SVD(V_SR, S_R, U_MR.mT) if wide else SVD(U_MR, S_R, V_SR.mT)


def left_vectors(W_OI: Tensor, C: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors U and the singular values S of ``linalg.whitened(W_OI, C, ridge)``.

    From ``WHITENED`` rows and columns they are the eigenvectors of ``W (C + ridge) W^T`` and the roots of its
    eigenvalues. So no root of C is taken. That takes less than half of the time. U is orthonormal to rounding, hence
    ``U U^T W = W``. The squared error of rank k is above the least possible one by at most ``10 R e sigma_1^2``, as for
    ``svd``. Singular values below 1e-8 of the largest are not told apart, and their vectors are mixed. Nothing is
    refused.

    Raises ``UserError`` where W or C hold NaN or infinity.
    """
    if not _is_large(W_OI, WHITENED):
        return linalg.svd(linalg.whitened(W_OI, C, ridge))[:2]
    require_finite(W_OI)
    linalg.require_finite_moment(C)
    # Of a tall matrix the rows lie in the span of Q, which has as many vectors as there are components.
    Q_OR, T_RI = torch.linalg.qr(W_OI) if W_OI.shape[-2] > W_OI.shape[-1] else (None, W_OI)
    full = C.ndim == W_OI.ndim
    weighted = T_RI @ C if full else T_RI * C.unsqueeze(-2)
    floor = linalg.floor_of(C.diagonal(dim1=-2, dim2=-1) if full else C, ridge).unsqueeze(-1)
    try:
        values_R, U_RR = torch.linalg.eigh((weighted + floor * T_RI) @ T_RI.mT)
    except torch.linalg.LinAlgError:
        return linalg.svd(linalg.whitened(W_OI, C, ridge))[:2]
    S_R, U_RR = values_R.clamp_min(0).sqrt().flip(-1), U_RR.flip(-1)
    return (U_RR if Q_OR is None else Q_OR @ U_RR), S_R


def _is_large(W_OI: Tensor, least: int) -> bool:
    return min(W_OI.shape[-2:]) >= least and W_OI.dtype == torch.float64


def truncated(read: Callable[[], Tensor], rank: int, precision: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the factors B (O, k) and A (k, I) of the best approximation ``B @ A`` of rank k of a large matrix W.

    ``read``: returns W_OI. It is called several times, so that W need not stay in memory.
    ``rank``: the rank k.
    ``precision``: of the factors; by default that of W.

    ``B = U sqrt(S)`` and ``A = sqrt(S) Vh``. They come from the leading eigenvectors of the smaller Gram matrix in
    float64. Squaring the singular values costs half of the digits, and float64 has more than twice the digits of
    float32. The error is about 1e-8 sigma_1, as for an SVD in float32.

    Memory: W with its Gram matrix, then that with k eigenvectors, then W with these and the factors. For a square W and
    k below break-even this is at most three times W in float32.

    Raises ``UserError`` where W holds NaN or infinity, and where a number of a factor is too large for ``precision``.
    """
    try:
        vectors = _leading_eigenvectors(gram(read()), rank, "evr")
    except scipy.linalg.LinAlgError:  # QR iteration is slower and hardly ever fails
        vectors = _leading_eigenvectors(gram(read()), rank, "ev")
    return _projected(read(), vectors, precision)


def gram(W_OI: Tensor) -> Tensor:
    """Return the smaller of ``W W^T`` and ``W^T W`` in float64. Raises ``UserError`` for NaN or infinity."""
    tall = _tall(W_OI)
    C_SS = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in _blocks(tall):
        part = rows.double()
        C_SS.addmm_(part.T, part)
    require_finite(C_SS.diagonal())  # these sums of squares are finite if all of W is
    return C_SS


def _leading_eigenvectors(C_SS: Tensor, rank: int, driver: str) -> Tensor:
    """Return the eigenvectors of the ``rank`` largest eigenvalues, in rising order, shape (S, R). C is overwritten."""
    size = len(C_SS)
    _, vectors = scipy.linalg.eigh(
        C_SS.numpy().T,  # C is symmetric; in this memory order LAPACK overwrites it without a copy
        subset_by_index=(size - rank, size - 1) if driver == "evr" else None,
        driver=driver,
        overwrite_a=True,
        check_finite=False,
    )
    return torch.from_numpy(vectors[:, -rank:])


def _projected(W_OI: Tensor, V_SR: Tensor, precision: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return the two factors of the projection of W on ``V_SR``, which is overwritten."""
    tall, wide, dtype = _tall(W_OI), W_OI.shape[0] < W_OI.shape[1], precision or W_OI.dtype
    US_MR = torch.empty(tall.shape[0], V_SR.shape[1], dtype=torch.promote_types(dtype, torch.float32))
    energy_R = torch.zeros(V_SR.shape[1], dtype=torch.float64)
    done = 0
    for rows in _blocks(tall):
        part = rows.double() @ V_SR
        energy_R += part.square().sum(0)
        US_MR[done : done + len(part)] = part
        done += len(part)
    del W_OI, tall, rows  # the factors need its memory
    root_R = energy_R.pow(0.25)  # root of the singular values, which are the norms of these columns
    US_MR /= torch.where(root_R > 0, root_R, 1.0).to(US_MR.dtype)
    V_SR *= root_R
    B_OR, A_IR = (linalg.in_precision(factor, dtype).flip(1) for factor in ((V_SR, US_MR) if wide else (US_MR, V_SR)))
    return B_OR.contiguous(), A_IR.T.contiguous()


def _tall(W_OI: Tensor) -> Tensor:
    """Return W, or its transpose if that has more rows."""
    return W_OI if W_OI.shape[0] >= W_OI.shape[1] else W_OI.T


def _blocks(tall: Tensor) -> tuple[Tensor, ...]:
    return tall.split(max(BLOCK_ROWS, BLOCK_BYTES // (8 * tall.shape[1])))
