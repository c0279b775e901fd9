"""SVD of a weight whose columns are scaled by the size of the layer's inputs (ASVD)."""

from typing import ClassVar

from torch import nn

from spectrim.decomposers.matrix import Factors, View, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.decomposers.whitened import WhitenedSpectrum, whitened_factors
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.factored.linalg import require_finite_moment
from spectrim.tools.settings import settings


@settings
class ScaledSVD:
    """SVD of ``W S`` with a diagonal S, as in ASVD (Yuan et al., arXiv 2312.05821): ``S_ii = (size of input i)^alpha``.

    The size is the root mean square on calibration data. The paper takes the mean absolute value. ``WhitenedSVD`` also
    knows how inputs go together, and replaces it. The paper's rank search is ``Sensitivity``.

    ``view``, ``factors``: as in ``SVD``.
    ``alpha``: in [0, 1]. 0 is the plain SVD.
    ``ridge``: is added to each squared scale as a fraction of their mean, so that the full rank reproduces W.
    ``samples``: number of calibration samples for the sizes.
    """

    view: View = "channel"
    alpha: float = 0.5
    ridge: float = 1e-6
    samples: int = 500
    factors: Factors = "plain"

    embeddings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must lie in [0, 1], got {self.alpha}")
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return (DenseLayer.of(layer).view(self.view),)

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> WhitenedSpectrum:
        """Decompose ``layer``. Raises ``UserError`` for a weight or a moment with NaN or infinity."""
        dense = DenseLayer.of(layer)
        W_OI = to_matrix(dense.weight.detach(), dense, self.view).double()
        moment = moments.get(dense.view(self.view))
        if moment is None:
            raise UserError("a scaled decomposition needs the second moment of the layer's inputs")
        require_finite_moment(moment)
        squares_I = moment.to(W_OI).diagonal(dim1=-2, dim2=-1).clamp_min(0)
        factors = whitened_factors(W_OI, squares_I**self.alpha, self.ridge)
        return WhitenedSpectrum(dense, self.view, *factors, self.factors)
