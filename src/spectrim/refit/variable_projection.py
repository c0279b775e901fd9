"""Fit the two factors of a convolution whose second one has a kernel, too, by variable projection.

The error to make small is that of ``least_squares``, in its units: an input has the mean square 1, and the W of full
rank that fits best explains 1 of the outputs.

Shape suffixes: O outputs, I inputs of a position, R components, P pixels of the second kernel, K inputs of the first
factor (input channels times pixels of its kernel), so that I = P K.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectrim.statistics.shifted_moments import LARGE

TOLERANCE = 1e-7  # an iteration that explains less than this part more of the outputs is the last
ITERATIONS = 500
ROUGH_TOLERANCE, ROUGH_ITERATIONS = 3e-4, 60  # of a weight with ``LARGE`` entries, for which each takes long
TINY = 1e-12  # of the mean diagonal, so that components without any weight leave a Gram matrix invertible


class _Moments(NamedTuple):
    """Hold what a fit needs of one group, by pixels of the second kernel.

    ``xx_PKPK``: second moments of the inputs, of a large weight in float32: their product with the first factor takes
        most of the time.
    ``yx_POK``: second moments of outputs and inputs. ``W_POK``: the weight of full rank that fits best.
    """

    xx_PKPK: Tensor
    yx_POK: Tensor
    W_POK: Tensor

    @classmethod
    def of(cls, xx_II: Tensor, yx_OI: Tensor, W_OI: Tensor, kernel: Sequence[int], vertical: bool) -> "_Moments":
        shape = len(xx_II) // prod(kernel), *kernel
        xx = xx_II.reshape(*shape, *shape)
        if vertical:  # the second kernel runs along the width
            xx = xx.transpose(1, 2).transpose(4, 5)
        pixels = xx.shape[1]
        xx = xx.permute(1, 0, 2, 4, 3, 5).reshape(pixels, -1, pixels, xx.shape[0] * xx.shape[2])

        def by_pixel(matrix_OI: Tensor) -> Tensor:
            matrix = matrix_OI.reshape(-1, *shape)
            matrix = matrix.transpose(2, 3) if vertical else matrix
            return matrix.permute(2, 0, 1, 3).flatten(2)

        return cls(xx.float() if _is_large(W_OI) else xx, by_pixel(yx_OI), by_pixel(W_OI))


def _is_large(W: Tensor) -> bool:
    return W.numel() >= LARGE


def by_variable_projection(
    xx_II: Tensor, yx_OI: Tensor, W_OI: Tensor, kernel: Sequence[int], vertical: bool, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the fitted first factor (R, K), and the second one (O, P R), in float64.

    For every first factor the best second one is known in closed form. So only the first one is searched for (Golub and
    Pereyra 1973). The search begins with the leading components V of the best W, in the norm of the outputs of one
    pixel. It is L-BFGS in coordinates in which the Hessian is near the identity: ``S A L_x``, where ``L_x L_x^T`` is
    the moment of x summed over pixels, and S holds the singular values of the components.

    ``W_OI``: the weight of full rank that fits best. ``kernel``: its sides.
    ``vertical``: whether the first kernel runs along the height, and the second along the width.
    Raises ``torch.linalg.LinAlgError`` where rounding makes a Gram matrix singular.
    """
    moments = _Moments.of(xx_II, yx_OI, W_OI, kernel, vertical)
    tolerance, iterations = (ROUGH_TOLERANCE, ROUGH_ITERATIONS) if _is_large(W_OI) else (TOLERANCE, ITERATIONS)
    L_x = torch.linalg.cholesky(_lifted(moments.xx_PKPK.diagonal(dim1=0, dim2=2).to(moments.W_POK).sum(-1)))
    W = moments.W_POK.flatten(0, 1) @ L_x
    squares, V = torch.linalg.eigh(W.mT @ W)
    S_R1 = squares[-rank:].clamp_min(TINY * squares[-1] + torch.finfo(W.dtype).tiny).sqrt().unsqueeze(1)
    dtype = moments.xx_PKPK.dtype
    latest: dict[bytes, tuple[Tensor, ...]] = {}  # the search asks twice for its first point and its last

    def solved(point: NDArray[np.float64]) -> tuple[Tensor, ...]:
        """Return the first factor at ``point`` and what ``_best_second`` makes of it."""
        if point.tobytes() not in latest:
            inner = torch.from_numpy(point).to(W).reshape(rank, -1) / S_R1
            A_RK = torch.linalg.solve_triangular(L_x, inner, upper=False, left=False)
            latest.clear()
            latest[point.tobytes()] = A_RK, *_best_second(moments, A_RK)
        return latest[point.tobytes()]

    def error(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return minus the explained part of the outputs, and its gradient."""
        A_RK, Z_PRPK, yx_ORP, B_OPR = solved(point)
        M_PRS = (B_OPR.mT @ B_OPR).unflatten(0, (len(Z_PRPK), -1))
        B_POR = B_OPR.unflatten(1, (len(Z_PRPK), -1)).transpose(0, 1)
        drop = (M_PRS.to(dtype) @ Z_PRPK.to(dtype).permute(2, 0, 1, 3).flatten(1, 2)).to(A_RK)
        slope = (drop - B_POR.mT @ moments.yx_POK).sum(0) / S_R1
        inner = torch.linalg.solve_triangular(L_x.mT, slope, upper=True, left=False)
        return -float((B_OPR * yx_ORP).sum()), (2 * inner).flatten().cpu().numpy()

    point = (S_R1 * V[:, -rank:].mT).flatten().cpu().numpy()
    if yx_OI.any() and error(point)[0] > tolerance - 1:  # something flows out, and more than next to nothing is missing
        settings = {"maxiter": iterations, "ftol": tolerance, "gtol": 0.0, "maxcor": 10}
        point = scipy.optimize.minimize(error, point, jac=True, method="L-BFGS-B", options=settings).x
    A_RK, _, _, B_OPR = solved(point)
    return A_RK, B_OPR


def _best_second(moments: _Moments, A_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments ``A xx`` and ``yx A^T`` of the first factor's outputs, and the best second factor (O, P R)."""
    xx_PKS = moments.xx_PKPK.flatten(2)
    Z_PRPK = (A_RK.to(xx_PKS) @ xx_PKS).to(A_RK).unflatten(2, (len(xx_PKS), -1))
    G_SS = (Z_PRPK @ A_RK.mT).reshape(len(xx_PKS) * len(A_RK), -1)
    yx_OS = (moments.yx_POK @ A_RK.mT).transpose(0, 1).flatten(1)
    return Z_PRPK, yx_OS, torch.cholesky_solve(yx_OS.mT, torch.linalg.cholesky(_lifted(G_SS))).mT


def _lifted(C_SS: Tensor) -> Tensor:
    """Return ``C`` with ``TINY`` of its mean diagonal added to the diagonal."""
    return C_SS + TINY * C_SS.diagonal().mean() * torch.eye(len(C_SS)).to(C_SS)
