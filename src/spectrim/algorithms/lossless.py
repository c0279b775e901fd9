"""Lossless optimisation (S1): make the loss smaller while compressing."""

from typing import Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.base import Compressed
from spectrim.algorithms.neighbourhood import Neighbourhood, Norm, Order, Walk
from spectrim.decomposers.spectrum import Decomposer
from spectrim.objective import Objective
from spectrim.settings import settings


@settings
class Lossless:
    """In each layer the rank of the most negative first-order change of the loss (Zhang et al., arXiv 2412.06867).

    Over ``0 < k < O*I/(O+I)`` inside the neighbourhood (``norm``, ``gamma``); a layer where no rank has a negative
    change stays dense. The other settings are those of ``Walk``.
    """

    verified: bool = False
    norm: Norm = "entrywise"
    gamma: float | None = 0.03
    split: Literal["calibration", "train"] = "calibration"
    order: Order = "network"
    tries: int = 4
    budget: float = 0.0
    refresh: bool = False

    def __post_init__(self) -> None:
        self._walk()  # checks the settings where they are given

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select ranks and cut. The given model is left as it was."""
        return self._walk().compress(model, decomposer, objective, most_negative_first)

    def _walk(self) -> Walk:
        near = Neighbourhood(self.norm, self.gamma)
        return Walk(near, self.verified, self.split, self.order, self.tries, self.budget, self.refresh)


def most_negative_first(curve: Tensor, ranks: Tensor) -> Tensor:
    """The ranks of negative first-order change, the most negative first."""
    falling = ranks[curve[ranks] < 0]
    return falling[torch.argsort(curve[falling], stable=True)]
