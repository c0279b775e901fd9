"""Make the model smaller while keeping the loss: compact optimisation (S1)."""

from torch import Tensor

from spectrim.algorithms.shared.walk import Walk
from spectrim.errors import UserError
from spectrim.tools.settings import settings


@settings
class Compact(Walk):
    """Take in each layer the smallest rank whose first-order change of the loss is at most ``tolerance``.

    The candidates are the ranks ``0 < k < O*I/(O+I)`` inside the neighbourhood (``norm``, ``gamma``). A layer without
    such a rank stays dense (Zhang et al., arXiv 2412.06867). The other settings are those of ``Walk``.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance >= 0:
            raise UserError(f"tolerance must be at least 0, got {self.tolerance}")

    def candidates(self, curve: Tensor, ranks: Tensor) -> Tensor:
        """Return the ranks whose first-order change is within the tolerance, the smallest first."""
        return ranks[curve[ranks] <= self.tolerance]
