"""Activation-whitened SVD: the best approximation of a layer's outputs on calibration data, not of its weight."""

import torch
from torch import Tensor, nn

from spectrim import linalg
from spectrim.decomposers.matrix import MatrixSpectrum, View, checked, form_of, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.errors import UserError
from spectrim.settings import settings


@settings
class WhitenedSVD:
    """SVD of ``W C^(1/2)``, with C = E[x x^T] the second moment of the layer's inputs x (one input a position).

    Cutting it to rank k minimises ``E ||W x - W_k x||^2`` over all rank-k matrices, exactly for a Linear and in the
    channel view; in the spatial view x is a row of kw pixels and the rows are taken for independent. As in SVD-LLM
    (Wang et al., arXiv 2403.07378) and BALF (arXiv 2509.25136), but without an inverse: the kept part of W is its
    projection ``U_k U_k^T W`` on the leading left vectors, which a singular C cannot harm.

    ``ridge``: added to C as a part of its mean eigenvalue, so that at full rank W comes back whole. ``samples``:
    number of calibration samples that C is taken from.

    ``embeddings``: whether they are factored too. An embedding is a Linear of inputs with a single 1, so C is the
    diagonal of how often each id comes, and the rows of its weight count by that (GroupReduce, Chen et al., arXiv
    1806.06950, which groups them by it besides).
    """

    view: View = "spatial"
    ridge: float = 1e-6
    samples: int = 500
    embeddings: bool = False

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        return (form_of(layer, self.view),)

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> "WhitenedSpectrum":
        """Decompose ``layer``. Raises ``UserError`` for a weight or a moment with NaN or infinity."""
        layer = checked(layer)
        W_OI = to_matrix(layer.weight.detach(), layer, self.view).double()
        moment = moments.get(form_of(layer, self.view))
        if moment is None:
            raise UserError("a whitened decomposition needs the second moment of the layer's inputs")
        U_OR, S_R, _ = linalg.svd(linalg.whitened(W_OI, moment.to(W_OI), self.ridge))
        A_RI = U_OR.transpose(-1, -2) @ W_OI
        size_R = A_RI.norm(dim=-1)
        unit = A_RI / size_R.clamp_min(torch.finfo(size_R.dtype).tiny).unsqueeze(-1)
        return WhitenedSpectrum(layer, self.view, linalg.SVD(U_OR, size_R, unit), S_R)


class WhitenedSpectrum(MatrixSpectrum):
    """``W = sum_i s_i u_i a_i^T`` with orthonormal u_i and unit a_i that are not orthogonal to one another.

    The components are ordered by ``importance`` (g, R), the singular values of the whitened weight; s_i does not fall.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, view: View, factors: linalg.SVD, importance: Tensor) -> None:
        super().__init__(layer, view, factors)
        self._importance = importance

    @property
    def importance(self) -> Tensor:
        return self._importance

    def weighted_error(self) -> Tensor:
        """Root of the mean squared change of the outputs, summed over outputs and positions, for every rank."""
        return linalg.tail_sums(self.importance.double().square()).sum(0).sqrt().cpu()
