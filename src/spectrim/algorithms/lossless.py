"""Lossless optimisation (S1): make the loss smaller while compressing."""

import torch
from torch import Tensor

from spectrim.algorithms.shared.neighbourhood import Walk
from spectrim.tools.settings import settings


@settings
class Lossless(Walk):
    """In each layer the rank of the most negative first-order change of the loss (Zhang et al., arXiv 2412.06867).

    Over ``0 < k < O*I/(O+I)`` inside the neighbourhood (``norm``, ``gamma``); a layer where no rank has a negative
    change stays dense. The settings are those of ``Walk``.
    """

    def candidates(self, curve: Tensor, ranks: Tensor) -> Tensor:
        """The ranks of negative first-order change, the most negative first."""
        falling = ranks[curve[ranks] < 0]
        return falling[torch.argsort(curve[falling], stable=True)]
