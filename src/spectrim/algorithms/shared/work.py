"""What a selection will do, as far as its algorithm can say so before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from spectrim.errors import MissingInput


@dataclass(frozen=True)
class Outlook:
    """What is known of a selection before it begins.

    ``samples``: number of samples of each split that is given.
    ``layers``: number of layers that can be factored. ``ties``: how many of them share their weight with others.
    """

    samples: Mapping[str, int]
    layers: int
    ties: int = 0

    def of(self, split: str) -> int:
        """Return the number of samples of a split. Raises ``MissingInput`` where there is none of this name."""
        if split not in self.samples:
            raise MissingInput(f"{split} batches are missing; pass {split}=")
        return self.samples[split]

    def first(self, samples: int) -> int:
        """Return how many samples are read where ``samples`` calibration samples are wanted."""
        return min(samples, self.of("calibration")) if samples else 0


@dataclass(frozen=True)
class Work:
    """What a selection does beside the decompositions.

    ``gradients``, ``gates``, ``evaluations``: samples of which weight gradients are taken, gate gradients at full rank
        (each direction counts), and the loss alone.
    ``refit``: samples on which the factors are refitted; 0 for no refit.
    ``weighed``: samples from which a refit learns how much each output counts; 0 where all outputs count alike.
    ``refine``: samples in all steps of a refinement; 0 for none.
    ``largest_entries``: whether the largest entry of each error is computed, which takes as long as a decomposition.
    ``params_kept``, ``macs_kept``: the budget, where there is one of these.
    ``rank``, ``ratio``: the rule that sets all ranks, where there is one. ``ranks``: the ranks, where they are given.
    ``at_most``: whether it may end earlier.
    """

    gradients: int = 0
    gates: int = 0
    evaluations: int = 0
    refit: int = 0
    weighed: int = 0
    refine: int = 0
    largest_entries: bool = False
    params_kept: float | None = None
    macs_kept: float | None = None
    rank: int | None = None
    ratio: float | None = None
    ranks: Mapping[str, int] | None = None
    at_most: bool = False


@runtime_checkable
class Foreseen(Protocol):
    """An algorithm that can say what it will do."""

    def work(self, outlook: Outlook) -> Work:
        """Return what the selection will do."""
