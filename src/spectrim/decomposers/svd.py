"""Plain SVD of a Linear or Conv2d weight, in the channel or the spatial view."""

from typing import ClassVar, Literal

import torch
from torch import nn

from spectrim.decomposers.matrix import MatrixSpectrum, View, checked, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.factored import linalg
from spectrim.tools.settings import settings


@settings
class SVD:
    """Truncated SVD, the best approximation of each rank in the Frobenius and the spectral norm (Eckart-Young).

    ``view`` says how a convolution (O, I/g, kh, kw) becomes a matrix: ``channel``: O x (I/g*kh*kw); ``spatial``:
    (O*kh) x (I/g*kw). One matrix a group, the same rank in each. ``precision``: of the decomposition.
    ``embeddings``: whether they are factored too.
    """

    view: View = "channel"
    precision: Literal["float32", "float64"] = "float64"
    embeddings: bool = False

    samples: ClassVar[int] = 0

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> MatrixSpectrum:
        """Decompose ``layer``; no moment is looked at. Raises ``UserError`` for a weight with NaN or infinity."""
        layer = checked(layer)
        matrix = to_matrix(layer.weight.detach(), layer, self.view).to(getattr(torch, self.precision))
        return MatrixSpectrum(layer, self.view, linalg.svd(matrix))
