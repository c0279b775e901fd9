"""The smallest rank of each layer within a relative error."""

from torch import nn

from spectrim import UserError
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class SmallError:
    """Keep in each layer the smallest rank whose relative error is at most ``error``, in (0, 1)."""

    error: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise UserError(f"error must lie in (0, 1), got {self.error}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        bench = Workbench.of(model, decomposer, objective)
        keep = {}
        for name, spectrum in bench.spectra.items():
            enough = spectrum.relative_error() <= self.error
            keep[name] = max(1, int(enough.nonzero()[0]))
        return bench.finish(keep)
