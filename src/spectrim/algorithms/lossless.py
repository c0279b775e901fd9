"""Compress and lower the loss: lossless optimisation (S1)."""

import torch
from torch import Tensor

from spectrim.algorithms.shared.walk import Walk
from spectrim.tools.settings import settings


@settings
class Lossless(Walk):
    """Take in each layer the rank with the most negative first-order change of the loss.

    The candidates are the ranks ``0 < k < O*I/(O+I)`` inside the neighbourhood (``norm``, ``gamma``). A layer without a
    rank of negative change stays dense (Zhang et al., arXiv 2412.06867). The settings are those of ``Walk``.
    """

    def candidates(self, curve: Tensor, ranks: Tensor) -> Tensor:
        """Return the ranks with a negative first-order change, the most negative first."""
        falling = ranks[curve[ranks] < 0]
        return falling[torch.argsort(curve[falling], stable=True)]
