"""SVD in subspaces: the input channels of a layer are split into parts, and each part has an SVD of its own."""

from math import gcd
from typing import ClassVar, Literal

import torch
from torch import nn

from spectrim.decomposers import resumed
from spectrim.decomposers.matrix import MatrixSpectrum, View, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.tools.settings import settings


@settings
class SubspaceSVD:
    """Split ``W = [W_1 ... W_k]`` along the input channels of each group, and truncate the SVD of every part.

    Liebenwein et al., arXiv 2107.11442, section 2.1. The first factor becomes a grouped layer, and the second sees all
    of its outputs. All parts have the same rank, which costs k * O + I parameters a component instead of O + I.

    ``subspaces``: number k of parts. A layer whose number of input channels is not a multiple of k has gcd(k, I) parts.
    ``view``, ``precision``: as in ``SVD``.
    """

    subspaces: int = 2
    view: View = "channel"
    precision: Literal["float32", "float64"] = "float64"

    samples: ClassVar[int] = 0
    embeddings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.subspaces < 1:
            raise UserError(f"subspaces must be at least 1, got {self.subspaces}")

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> MatrixSpectrum:
        """Decompose ``layer`` and ignore ``moments``. Raises ``UserError`` for a weight with NaN or infinity."""
        dense = DenseLayer.of(layer)
        parts = gcd(self.subspaces, dense.inputs)
        matrices = to_matrix(dense.weight.detach(), dense, self.view, parts).to(getattr(torch, self.precision))
        return MatrixSpectrum(dense, self.view, resumed.svd(matrices), parts)
