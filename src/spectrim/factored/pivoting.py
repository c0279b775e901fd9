"""Pivots of a matrix: a few of its own rows that give all other rows with small coefficients."""

from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.factored.linalg import require_finite

BOUND = 2.0  # of the coefficients: larger ones would magnify the rounding of the pivots


class Pivots(NamedTuple):
    """``(B @ A)[pivots] = pivot_rows_RI`` and ``(B @ A)[others] = coefficients_MR @ pivot_rows_RI``, M = O - R.

    ``pivots``: int64 of shape (R,). ``others``: the remaining rows in rising order, int64 of shape (M,).
    """

    pivots: Tensor
    others: Tensor
    pivot_rows_RI: Tensor
    coefficients_MR: Tensor

    @property
    def positions(self) -> Tensor:
        """For each row its place among the pivots and, after them, the others. Shape (O,)."""
        return torch.cat([self.pivots, self.others]).argsort()


def pivoted(B_OR: Tensor, A_RI: Tensor) -> Pivots:
    """Choose R rows of ``B @ A`` as pivots, so that no coefficient of another row is above ``BOUND``.

    Pivots and coefficients hold R (O + I - R) numbers, the two factors R (O + I). The product is the same to rounding.
    This is the form of PIFA (Zhao et al., ICML 2025). Gaussian elimination chooses the first pivots. They are then
    exchanged as in strong rank-revealing QR (Gu and Eisenstat, 1996). Dependent columns of B do no harm, because the
    choice is made in an orthonormal basis that contains them. Computed in float64.

    Memory: the larger of four matrices of the shape of B and of two of each shape, in float64.

    Raises ``UserError`` for NaN or infinity.
    """
    require_finite(B_OR)
    require_finite(A_RI)
    Q_OR, R_RR = torch.linalg.qr(B_OR.double())
    pivots = _exchanged(Q_OR, _by_elimination(Q_OR))
    is_other = torch.ones(len(Q_OR), dtype=torch.bool, device=Q_OR.device)
    is_other[pivots] = False
    others = is_other.nonzero().flatten()
    coefficients_MR = _coefficients(Q_OR, pivots)[others]
    return Pivots(pivots, others, Q_OR[pivots] @ (R_RR @ A_RI.double()), coefficients_MR)


def _by_elimination(Q_OR: Tensor) -> Tensor:
    """Return the R rows of Q that Gaussian elimination with partial pivoting takes as pivots."""
    order = list(range(len(Q_OR)))
    for row, exchanged in enumerate((torch.linalg.lu_factor(Q_OR).pivots - 1).tolist()):
        order[row], order[exchanged] = order[exchanged], order[row]
    return torch.tensor(order[: Q_OR.shape[1]], device=Q_OR.device)


def _coefficients(Q_OR: Tensor, pivots: Tensor) -> Tensor:
    """Return H with ``Q = H @ Q[pivots]``, shape (O, R)."""
    return torch.linalg.solve(Q_OR[pivots], Q_OR, left=False)


def _exchanged(Q_OR: Tensor, pivots: Tensor) -> Tensor:
    """Exchange a pivot for another row until no coefficient is above ``BOUND``.

    Each exchange multiplies the volume ``|det Q[pivots]|`` by more than ``BOUND``. The volume is at most 1, so this
    ends.
    """
    pivots, H_OR = pivots.clone(), _coefficients(Q_OR, pivots)
    while True:
        row, which = divmod(int(H_OR.abs().argmax()), len(pivots))
        largest = H_OR[row, which].clone()
        if largest.abs() <= BOUND:
            return pivots
        change = H_OR[row].clone()
        change[which] -= 1
        H_OR -= torch.outer(H_OR[:, which] / largest, change)
        pivots[which] = row
