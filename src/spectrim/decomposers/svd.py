"""Plain SVD of a Linear, Embedding or Conv2d weight, in the channel or the spatial view."""

from typing import ClassVar, Literal

import torch
from torch import nn

from spectrim.decomposers import resumed
from spectrim.decomposers.matrix import Factors, MatrixSpectrum, View, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Embeddings, Moments
from spectrim.factored.dense import DenseLayer
from spectrim.tools.settings import settings


@settings
class SVD:
    """Truncated SVD, the best approximation of each rank in the Frobenius and the spectral norm (Eckart-Young).

    ``view``: how a convolution (O, I/g, kh, kw) is read as a matrix. ``channel``: O x (I/g*kh*kw). ``spatial``:
        (O*kh) x (I/g*kw). Each group has a matrix of its own, and all have the same rank.
    ``precision``: of the decomposition.
    ``embeddings``: whether embeddings are factored too; "tied": only those that share their weight with other layers.
    ``factors``: what is stored at rank k. ``plain``: two factors. ``pivoted``: k rows of their product, and the
        coefficients of its other rows in them. These compute the same and hold k² numbers less for each matrix. They
        are smaller than the dense weight at every rank below the full one (Zhao et al., ICML 2025).
    """

    view: View = "channel"
    precision: Literal["float32", "float64"] = "float64"
    embeddings: Embeddings = False
    factors: Factors = "plain"

    samples: ClassVar[int] = 0

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> MatrixSpectrum:
        """Decompose ``layer`` and ignore ``moments``. Raises ``UserError`` for a weight with NaN or infinity."""
        dense = DenseLayer.of(layer)
        matrix = to_matrix(dense.weight.detach(), dense, self.view).to(getattr(torch, self.precision))
        return MatrixSpectrum(dense, self.view, resumed.svd(matrix), factors=self.factors)
