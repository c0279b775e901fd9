"""Fit the two factors of a large convolution by least squares: in closed form, or by variable projection.

With the inputs x of one position (all pixels of a patch) and the wanted outputs y, the factors of W minimise
``E ||y - W x||^2 = tr(W xx W^T) - 2 tr(yx W^T)`` up to a constant, where ``xx = E[x x^T]`` and ``yx = E[y x^T]``.

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

from spectrim.factored.layers import FactoredConv2d
from spectrim.statistics.shifted_moments import LARGE

TOLERANCE = 3e-4  # an iteration that explains less than this part more of the outputs is the last
ITERATIONS = 60
TINY = 1e-12  # of the mean diagonal, so that components without any weight leave a Gram matrix invertible


def is_large(layer: FactoredConv2d, entries: int) -> bool:
    """Return whether ``fitted`` fits ``layer``, whose weight has so many ``entries``. It does not fit subspaces.

    Smaller ones are fitted by LBFGS, as those of the published numbers were.
    """
    return entries >= LARGE and layer.first.groups == layer.second.groups


def fitted(
    layer: FactoredConv2d, weights: Sequence[Tensor], xx_gII: Tensor, root_gII: Tensor, yx_gOI: Tensor
) -> list[Tensor]:
    """Return plain ``weights`` of both factors that fit best, all in float64.

    In the channel view this is the least error of all. In the other views it is that of a minimum near the W of full
    rank that fits best, to some ``TOLERANCE`` of what that W explains.

    ``weights``: those at hand; their shapes alone matter.
    ``xx_gII``, ``yx_gOI``: the second moments of each group.
    ``root_gII``: the Cholesky factor of each ``xx``.
    Raises ``torch.linalg.LinAlgError`` where rounding makes a Gram matrix singular.
    """
    sizes = [weight.unflatten(0, (len(xx_gII), -1))[0].shape for weight in weights]
    found = []
    for xx_II, root_II, yx_OI in zip(xx_gII, root_gII, yx_gOI, strict=True):
        if layer.view == "channel":
            A, B = reduced_rank(root_II, yx_OI, layer.rank)
        else:
            kernel = [one * other for one, other in zip(sizes[0][2:], sizes[1][2:], strict=True)]  # either is 1
            W_OI = torch.cholesky_solve(yx_OI.mT, root_II).mT
            moments = _Moments.of(xx_II, yx_OI, W_OI, kernel, layer.view)
            A, B = _by_variable_projection(moments, layer.rank)
            B = B.unflatten(1, (-1, layer.rank)).mT
        found.append((A.reshape(sizes[0]), B.reshape(sizes[1])))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def reduced_rank(root_II: Tensor, yx_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors A (R, I) and B (O, R) of their rank, in closed form.

    The product is the least-squares fit, projected on its leading outputs (Izenman 1975).

    ``root_II``: the Cholesky factor L of the moment of the inputs. In inputs ``L^{-1} x`` the fit is ``yx L^{-T}``.
    """
    fit_IO = torch.linalg.solve_triangular(root_II, yx_OI.mT, upper=False)
    U = torch.linalg.eigh(fit_IO.mT @ fit_IO).eigenvectors[:, -rank:]
    A = torch.linalg.solve_triangular(root_II.mT, fit_IO @ U, upper=True).mT
    return A, U


class _Moments(NamedTuple):
    """Hold what a fit needs of one group, by pixels of the second kernel.

    ``xx_PKPK``: second moments of the inputs, in float32: their product with the first factor takes most of the time.
    ``yx_POK``: second moments of outputs and inputs. ``W_POK``: the weight of full rank that fits best.
    """

    xx_PKPK: Tensor
    yx_POK: Tensor
    W_POK: Tensor

    @classmethod
    def of(cls, xx_II: Tensor, yx_OI: Tensor, W_OI: Tensor, kernel: Sequence[int], view: str) -> "_Moments":
        shape = len(xx_II) // prod(kernel), *kernel
        xx = xx_II.reshape(*shape, *shape)
        if view == "vertical":  # the second kernel runs along the width
            xx = xx.transpose(1, 2).transpose(4, 5)
        pixels = xx.shape[1]
        xx = xx.permute(1, 0, 2, 4, 3, 5).reshape(pixels, -1, pixels, xx.shape[0] * xx.shape[2])

        def by_pixel(matrix_OI: Tensor) -> Tensor:
            matrix = matrix_OI.reshape(-1, *shape)
            matrix = matrix.transpose(2, 3) if view == "vertical" else matrix
            return matrix.permute(2, 0, 1, 3).flatten(2)

        return cls(xx.float(), by_pixel(yx_OI), by_pixel(W_OI))


def _by_variable_projection(moments: _Moments, rank: int) -> tuple[Tensor, Tensor]:
    """Return the fitted first factor (R, K), and the second one (O, P R).

    For every first factor the best second one is known in closed form. So only the first one is searched for (Golub and
    Pereyra 1973). The search begins with the leading components V of the best W, in the norm of the outputs of one
    pixel. It is L-BFGS in coordinates in which the Hessian is near the identity: ``S A L_x``, where ``L_x L_x^T`` is
    the moment of x summed over pixels, and S holds the singular values of the components.
    """
    L_x = torch.linalg.cholesky(_lifted(moments.xx_PKPK.diagonal(dim1=0, dim2=2).to(moments.W_POK).sum(-1)))
    W = moments.W_POK.flatten(0, 1) @ L_x
    squares, V = torch.linalg.eigh(W.mT @ W)
    S_R1 = squares[-rank:].clamp_min(TINY * squares[-1] + torch.finfo(W.dtype).tiny).sqrt().unsqueeze(1)
    most = (moments.W_POK * moments.yx_POK).sum()
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
        """Return minus the explained part of ``most``, and its gradient."""
        A_RK, Z_PRPK, yx_ORP, B_OPR = solved(point)
        M_PRS = (B_OPR.mT @ B_OPR).unflatten(0, (len(Z_PRPK), -1))
        B_POR = B_OPR.unflatten(1, (len(Z_PRPK), -1)).transpose(0, 1)
        drop = (M_PRS.float() @ Z_PRPK.float().permute(2, 0, 1, 3).flatten(1, 2)).to(A_RK)
        slope = (drop - B_POR.mT @ moments.yx_POK).sum(0) / S_R1
        inner = torch.linalg.solve_triangular(L_x.mT, slope, upper=True, left=False)
        return -float((B_OPR * yx_ORP).sum() / most), (2 / most * inner).flatten().cpu().numpy()

    point = (S_R1 * V[:, -rank:].mT).flatten().cpu().numpy()
    if most > 0 and error(point)[0] > TOLERANCE - 1:  # something flows out, and more than next to nothing is missing
        settings = {"maxiter": ITERATIONS, "ftol": TOLERANCE, "gtol": 0.0, "maxcor": 10}
        point = scipy.optimize.minimize(error, point, jac=True, method="L-BFGS-B", options=settings).x
    A_RK, _, _, B_OPR = solved(point)
    return A_RK, B_OPR


def _best_second(moments: _Moments, A_RK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments ``A xx`` and ``yx A^T`` of the first factor's outputs, and the best second factor (O, P R)."""
    pixels, inputs = moments.xx_PKPK.shape[:2]
    Z_PRPK = (A_RK.float() @ moments.xx_PKPK.reshape(pixels, inputs, -1)).to(A_RK).reshape(pixels, -1, pixels, inputs)
    G_SS = (Z_PRPK @ A_RK.mT).reshape(pixels * len(A_RK), -1)
    yx_OS = (moments.yx_POK @ A_RK.mT).transpose(0, 1).flatten(1)
    return Z_PRPK, yx_OS, torch.cholesky_solve(yx_OS.mT, torch.linalg.cholesky(_lifted(G_SS))).mT


def _lifted(C_SS: Tensor) -> Tensor:
    """Return ``C`` with ``TINY`` of its mean diagonal added to the diagonal."""
    return C_SS + TINY * C_SS.diagonal().mean() * torch.eye(len(C_SS)).to(C_SS)
