"""Compress by any selector, then fit the factors to the outputs of the dense layers."""

from dataclasses import replace

from torch import nn

from spectrim.algorithms.shared.compressed import Algorithm, Compressed, decomposer_of
from spectrim.algorithms.shared.work import Foreseen, Outlook, Work
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.refit.factors import refit
from spectrim.statistics.objective import Objective
from spectrim.surgery.reopening import reopened
from spectrim.surgery.unpacking import unpacked
from spectrim.tools.settings import settings


@settings
class Refitted:
    """Compress by ``selector``, then fit the kept factors on ``samples`` calibration samples (``factors.refit``).

    Joint selection ends with the same refit. It needs no labels and no training.
    """

    selector: Algorithm
    samples: int = 1000

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def work(self, outlook: Outlook) -> Work:
        """Return the work of the selector, with the refit. Raises ``UserError`` for one that does not say its own."""
        if not isinstance(self.selector, Foreseen):
            raise UserError(f"{type(self.selector).__name__} does not say what it will do; leave dry_run out")
        return replace(self.selector.work(outlook), refit=outlook.first(self.samples))

    @property
    def decomposer(self) -> Decomposer:
        """Return the decomposer that the selector is best with."""
        return decomposer_of(self.selector)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Compress and fit. Raises ``UserError`` for an empty calibration set."""
        compressed = self.selector.compress(model, decomposer, objective)
        notes = refit(compressed.model, reopened(unpacked(model)), objective, self.samples)
        return replace(compressed, notes=[*compressed.notes, *notes])
