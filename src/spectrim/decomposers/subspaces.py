"""SVD in subspaces: the input channels of a layer in several parts, each of them decomposed by itself."""

from math import gcd
from typing import ClassVar, Literal

import torch
from torch import nn

from spectrim.decomposers.matrix import MatrixSpectrum, View, checked, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.layers import inputs_of
from spectrim.tools.settings import settings


@settings
class SubspaceSVD:
    """``W = [W_1 ... W_k]``, cut along the input channels of each group, and a truncated SVD of every part.

    Liebenwein et al., arXiv 2107.11442, section 2.1: the first factor becomes a grouped layer, the second sees all of
    its outputs. The same rank in each part, so that a rank costs k * O + I where it costs O + I in one. ``subspaces``:
    k, in a layer whose number of input channels it does not divide the largest number that divides both.
    """

    subspaces: int = 2
    view: View = "channel"
    precision: Literal["float32", "float64"] = "float64"

    samples: ClassVar[int] = 0
    embeddings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.subspaces < 1:
            raise UserError(f"subspaces must be at least 1, got {self.subspaces}")

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> MatrixSpectrum:
        """Decompose ``layer``; no moment is looked at. Raises ``UserError`` for a weight with NaN or infinity."""
        layer = checked(layer)
        parts = gcd(self.subspaces, inputs_of(layer))
        matrices = to_matrix(layer.weight.detach(), layer, self.view, parts).to(getattr(torch, self.precision))
        return MatrixSpectrum(layer, self.view, linalg.svd(matrices), parts)
