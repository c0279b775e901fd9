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

LARGE = 1 << 20  # entries of a weight; smaller ones are fitted by LBFGS, as those of the published numbers were
TOLERANCE = 1e-4  # an iteration that explains less than this part more of the outputs is the last
ITERATIONS = 60
TINY = 1e-12  # of the mean diagonal, so that components without any weight leave a Gram matrix invertible


def is_large(layer: FactoredConv2d, entries: int) -> bool:
    """Return whether ``fitted`` fits ``layer``, whose weight has so many ``entries``. It does not fit subspaces."""
    return entries >= LARGE and layer.first.groups == layer.second.groups


def fitted(
    layer: FactoredConv2d, weights: list[Tensor], xx_gII: Tensor, root_gII: Tensor, yx_gOI: Tensor
) -> list[Tensor]:
    """Return the weights of both factors that fit best, all in float64.

    In the channel view this is the least error of all. In the other views it is that of a minimum near ``weights``, to
    some 1e-4 of what W explains (``TOLERANCE``). LBFGS on both factors comes to the same minima in hundreds of steps.
    On a layer with 512 x 4,608 entries the closed form took 4 s of one core, and 60 steps of LBFGS about ten times as
    long.

    ``weights``: the plain ones at hand.
    ``xx_gII``, ``yx_gOI``: the second moments of each group. ``xx`` must be positive definite.
    ``root_gII``: the Cholesky factor of each ``xx``.
    Raises ``torch.linalg.LinAlgError`` where rounding makes a Gram matrix singular.
    """
    found = []
    for group, (xx_II, root_II, yx_OI) in enumerate(zip(xx_gII, root_gII, yx_gOI, strict=True)):
        first, second = (weight.unflatten(0, (len(xx_gII), -1))[group] for weight in weights)
        if layer.view == "channel":
            A, B, _ = reduced_rank(root_II, yx_OI, layer.rank)
        else:
            sides = zip(first.shape[2:], second.shape[2:], strict=True)
            kernel = [one * other for one, other in sides]  # either is 1
            moments = _Moments.of(xx_II, yx_OI, kernel, layer.view)
            A, B = _by_variable_projection(moments, first.flatten(1))
            B = B.unflatten(1, (-1, layer.rank)).mT
        found.append((A.reshape(first.shape), B.reshape(second.shape)))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def reduced_rank(root_II: Tensor, yx_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best factors A (R, I) and B (O, R) of their rank, in closed form, and their product.

    The product is the least-squares fit, projected on its leading outputs (Izenman 1975).

    ``root_II``: the Cholesky factor L of the moment of the inputs. In inputs ``L^{-1} x`` the fit is ``yx L^{-T}``.
    """
    fit_IO = torch.linalg.solve_triangular(root_II, yx_OI.mT, upper=False)
    U = torch.linalg.eigh(fit_IO.mT @ fit_IO).eigenvectors[:, -rank:]
    A = torch.linalg.solve_triangular(root_II.mT, fit_IO @ U, upper=True).mT
    return A, U, U @ A


class _Moments(NamedTuple):
    """Hold the second moments of one group, by pixels of the second kernel: xx (P, K, P, K), and yx (P, O, K).

    ``xx`` is in float32, for its product with the first factor takes most of the time of a fit.
    """

    xx_PKPK: Tensor
    yx_POK: Tensor

    @classmethod
    def of(cls, xx_II: Tensor, yx_OI: Tensor, kernel: Sequence[int], view: str) -> "_Moments":
        shape = len(xx_II) // prod(kernel), *kernel
        xx, yx = xx_II.reshape(*shape, *shape), yx_OI.reshape(-1, *shape)
        if view == "vertical":  # the second kernel runs along the width
            xx, yx = xx.transpose(1, 2).transpose(4, 5), yx.transpose(2, 3)
        outer = xx.shape[1]
        xx = xx.permute(1, 0, 2, 4, 3, 5).reshape(outer, -1, outer, xx.shape[0] * xx.shape[2])
        return cls(xx.float(), yx.permute(2, 0, 1, 3).flatten(2))


def _by_variable_projection(moments: _Moments, A_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fitted first factor (R, K), and the second one (O, P R), beginning with the first factor at hand.

    For every first factor the best second one is known in closed form. So only the first one is searched for (Golub and
    Pereyra 1973), by L-BFGS in coordinates in which the Hessian is near the identity: ``L_m^T A L_x``, where
    ``L_x L_x^T`` is the moment of x summed over pixels, and ``L_m L_m^T`` that of the second factor's columns.
    """
    solve = torch.linalg.solve_triangular
    _, yx_ORP, B_OPR = _best_second(moments, A_RK)
    energy = (B_OPR * yx_ORP).sum()
    if not energy > 0:  # nothing flows out
        return A_RK, B_OPR
    columns = B_OPR.reshape(-1, len(A_RK))
    L_x = torch.linalg.cholesky(_lifted(moments.xx_PKPK.diagonal(dim1=0, dim2=2).to(A_RK).sum(-1)))
    L_m = torch.linalg.cholesky(_lifted(columns.mT @ columns)) / energy.sqrt()

    def first_at(point: NDArray[np.float64]) -> Tensor:
        inner = solve(L_m.mT, torch.from_numpy(point).to(A_RK).reshape(A_RK.shape), upper=True)
        return solve(L_x, inner, upper=False, left=False)

    def error(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Return the error over ``energy``, up to a constant, and its gradient."""
        A_RK = first_at(point)
        Z_PRPK, yx_ORP, B_OPR = _best_second(moments, A_RK)
        M_PRS = (B_OPR.mT @ B_OPR).unflatten(0, (len(Z_PRPK), -1))
        B_POR = B_OPR.unflatten(1, (len(Z_PRPK), -1)).transpose(0, 1)
        slope = (M_PRS @ Z_PRPK.permute(2, 0, 1, 3).flatten(1, 2) - B_POR.mT @ moments.yx_POK).sum(0)
        inner = solve(L_x.mT, solve(L_m, slope, upper=False), upper=True, left=False)
        return -float((B_OPR * yx_ORP).sum() / energy), (2 / energy * inner).flatten().cpu().numpy()

    start = (L_m.mT @ A_RK @ L_x).flatten().cpu().numpy()
    settings = {"maxiter": ITERATIONS, "ftol": TOLERANCE, "gtol": 0.0, "maxcor": 10}
    A_RK = first_at(scipy.optimize.minimize(error, start, jac=True, method="L-BFGS-B", options=settings).x)
    return A_RK, _best_second(moments, A_RK)[2]


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
