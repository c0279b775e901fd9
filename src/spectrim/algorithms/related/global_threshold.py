"""Cut all layers by one threshold on their relative singular values, which the budget sets.

With ``norm="spectral"`` the largest relative spectral error of any layer is as small as the budget allows. That is the
allocation of ALDS (Liebenwein et al., arXiv 2107.11442, section 3.3) with one subspace per layer. ``ALDS`` takes
several. With ``norm="frobenius"`` it is magnitude pruning of singular values.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from spectrim.algorithms.rank_selection import singular_values
from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class GlobalThreshold(Budgeted):
    """Keep in every layer the components whose singular value is above one common part of the norm of its weight.

    ``norm``: ``spectral`` or ``frobenius``; the norm that the singular values of a layer are divided by.
    """

    norm: Literal["spectral", "frobenius"] = "spectral"

    decomposer: ClassVar[Decomposer] = SVD()  # needs no data, as the threshold does

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find the threshold and cut. Raises ``UserError`` for a budget out of reach."""
        bench, costs, requested = self.budget(Workbench.of(model, decomposer, objective))
        relative = {
            layer: self._relative(singular_values(layer, spectrum)) for layer, spectrum in bench.spectra.items()
        }

        def ranks_at(kept: float) -> dict[str, int]:
            return {layer: max(1, int(values.gt(1 - kept).sum())) for layer, values in relative.items()}

        return bench.finish(costs.meet(requested, ranks_at, low=0.0, high=1.0))

    def _relative(self, S_R: Tensor) -> Tensor:
        return S_R / (S_R[0] if self.norm == "spectral" else S_R.norm()).clamp_min(1e-300)
