"""Define a measurement and what it returns. It looks at a model and compresses nothing."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn

from spectrim.decomposers.spectrum import Decomposer
from spectrim.statistics.objective import Objective


@dataclass(frozen=True)
class Readings:
    """Hold what a measurement found.

    ``rows``: one dictionary of numbers for each thing that was measured; all have the same keys.
    ``notes``: what could not be measured, and why.
    """

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@runtime_checkable
class Measurement(Protocol):
    """Measure a model and leave it as it was."""

    def measure(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Readings:
        """Return the readings. ``decomposer`` gives the spectra, ``objective`` the splits and the loss."""
