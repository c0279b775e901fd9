"""Tell the ranks near the trained weight, at which a first-order prediction is believed."""

from typing import Literal

import torch
from torch import Tensor

from spectrim.decomposers.spectrum import Spectrum
from spectrim.errors import UserError
from spectrim.tools.settings import settings

Norm = Literal["entrywise", "relative", "frobenius"]


@settings
class Neighbourhood:
    """Bound the size of a weight change up to which its first-order prediction is used.

    ``norm``: ``entrywise``, ``max |W_k - W|``, the condition that S1b states; ``relative``,
        ``||W_k - W||_F / ||W||_F``; or ``frobenius``, ``||W_k - W||_F``.
    ``gamma``: the largest value of the norm that is allowed, above 0; None allows every rank.
    """

    norm: Norm = "entrywise"
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and not self.gamma > 0:
            raise UserError(f"gamma must be above 0 (or null, for no bound), got {self.gamma}")

    def ranks(self, spectrum: Spectrum) -> Tensor:
        """Return the ranks from 1 to break-even whose weight change lies inside, in ascending order."""
        ranks = torch.arange(1, spectrum.break_even + 1)
        if self.gamma is None:
            return ranks
        if self.norm == "entrywise":
            size = spectrum.largest_entry()
        else:
            size = spectrum.relative_error() if self.norm == "relative" else spectrum.error()
        return ranks[size[ranks] <= self.gamma]
