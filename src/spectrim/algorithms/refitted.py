"""Any selector, and after it the fit of the factors to the outputs of the dense layers."""

from torch import nn

from spectrim.algorithms.shared.compressed import Algorithm, Compressed
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.refit.factors import refit
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class Refitted:
    """Compress by ``selector``, then fit what is left by ``samples`` calibration samples (``factors.refit``).

    What joint selection does at its end, for the others: without labels and without training.
    """

    selector: Algorithm
    samples: int = 1000

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Compress and fit. Raises ``UserError`` for an empty calibration set."""
        compressed = self.selector.compress(model, decomposer, objective)
        compressed.notes.extend(refit(compressed.model, model, objective, self.samples))
        return compressed
