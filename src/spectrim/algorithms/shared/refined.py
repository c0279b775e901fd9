"""Refine the model that an algorithm has compressed."""

from dataclasses import replace

from torch import nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.refit.refinement import Refinement, refine
from spectrim.statistics.objective import Objective


def refined(
    compressed: Compressed, dense: nn.Module, objective: Objective, refinement: Refinement | None
) -> Compressed:
    """Refine the model of ``compressed``, in place, towards ``dense``; return what is known of it then.

    None leaves it as it is. The log gets an entry: steps, inputs, samples (each as often as it was read), seconds, and
    the distance on held-out inputs before and after.
    """
    if refinement is None:
        return compressed
    done = refine(compressed.model, dense, objective, refinement)
    notes = [*compressed.notes, *done.notes]
    if done.entry is None:
        return replace(compressed, notes=notes)
    return replace(compressed, log=[*compressed.log, done.entry], notes=notes, trained=True)
