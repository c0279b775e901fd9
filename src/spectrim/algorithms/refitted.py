"""Compress by any algorithm, then fit the factors to the outputs of the dense layers."""

from dataclasses import replace

from torch import nn

from spectrim.algorithms.shared.compressed import Algorithm, Compressed, decomposer_of
from spectrim.algorithms.shared.refined import refined
from spectrim.algorithms.shared.work import Foreseen, Outlook, Work
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.refit.factors import refit
from spectrim.refit.refinement import Refinement
from spectrim.refit.weighting import RefitBy, output_weights
from spectrim.statistics.objective import Objective
from spectrim.surgery.reopening import reopened
from spectrim.surgery.unpacking import unpacked
from spectrim.tools.settings import settings


@settings
class Refitted:
    """Compress by ``selector``, then fit the kept factors on ``samples`` calibration samples (``factors.refit``).

    Joint selection ends with the same refit, by the loss. It needs no labels and no training.

    ``refit_by``: ``"outputs"``: the errors of all outputs of a layer count alike. ``"loss"``: an error counts as much
        as the loss feels it, to second order (``weighting.output_weights``). Targets are then needed.
    ``refine``: gradient steps after the refit, without labels (``refinement.Refinement``); None takes none.
    """

    selector: Algorithm
    samples: int = 1000
    refine: Refinement | None = None
    refit_by: RefitBy = "outputs"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def work(self, outlook: Outlook) -> Work:
        """Return the work of the algorithm, with the refit. Raises ``UserError`` for one that does not say its own."""
        if not isinstance(self.selector, Foreseen):
            raise UserError(f"{type(self.selector).__name__} does not say what it will do; leave dry_run out")
        steps = self.refine.samples if self.refine else 0
        samples = outlook.first(self.samples)
        weighed = samples if self.refit_by == "loss" else 0
        return replace(self.selector.work(outlook), refit=samples, weighed=weighed, refine=steps)

    @property
    def decomposer(self) -> Decomposer:
        """Return the decomposer that the algorithm is best with."""
        return decomposer_of(self.selector)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Compress and fit. Raises ``UserError`` for an empty calibration split."""
        if self.refine is not None:
            self.refine.require(model, objective)
        compressed, dense = self.selector.compress(model, decomposer, objective), reopened(unpacked(model))
        weights = output_weights(self.refit_by, dense, compressed.plan, objective, self.samples)
        notes = refit(compressed.model, dense, objective, self.samples, weights=weights)
        return refined(replace(compressed, notes=[*compressed.notes, *notes]), dense, objective, self.refine)
