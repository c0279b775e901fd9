"""Compact optimisation (S1): make the model smaller while keeping the loss."""

from typing import Literal

from torch import Tensor, nn

from spectrim.algorithms.base import Compressed
from spectrim.algorithms.neighbourhood import Neighbourhood, Norm, Order, Walk
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.objective import Objective
from spectrim.settings import settings


@settings
class Compact:
    """In each layer the smallest rank whose first-order change of the loss is at most ``tolerance``
    (Zhang et al., arXiv 2412.06867).

    Over ``0 < k < O*I/(O+I)`` inside the neighbourhood (``norm``, ``gamma``); a layer without such a rank stays dense.
    The other settings are those of ``Walk``.
    """

    verified: bool = False
    tolerance: float = 0.0
    norm: Norm = "entrywise"
    gamma: float | None = 0.03
    split: Literal["calibration", "train"] = "calibration"
    order: Order = "network"
    tries: int = 4
    budget: float = 0.0
    refresh: bool = False

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise UserError(f"tolerance must be at least 0, got {self.tolerance}")
        self._walk()  # checks the settings where they are given

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select ranks and cut. The given model is left as it was."""

        def smallest_first(curve: Tensor, ranks: Tensor) -> Tensor:
            return ranks[curve[ranks] <= self.tolerance]

        return self._walk().compress(model, decomposer, objective, smallest_first)

    def _walk(self) -> Walk:
        near = Neighbourhood(self.norm, self.gamma)
        return Walk(near, self.verified, self.split, self.order, self.tries, self.budget, self.refresh)
