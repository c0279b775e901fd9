"""Activation-whitened SVD: the best approximation of a layer's outputs on calibration data, not of its weight."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.decomposers.matrix import MatrixSpectrum, View, checked, form_of, to_matrix
from spectrim.decomposers.spectrum import NO_MOMENTS, Keep, Moments
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.layers import embedding_form
from spectrim.tools.settings import settings


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
    diagonal of how often each id comes, and the rows of its weight count by that. ``whole``: the most frequent ids, as
    many as make this part of all that is looked up, keep their rows as they are, and the rows of the others alone are a
    product: GroupReduce (Chen et al., arXiv 1806.06950) with two groups, the first of full rank.
    """

    view: View = "spatial"
    ridge: float = 1e-6
    samples: int = 500
    embeddings: bool = False
    whole: float = 0.0

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")
        if not 0 <= self.whole < 1:
            raise UserError(f"whole must lie in [0, 1), got {self.whole}")
        if self.whole and not self.embeddings:
            raise UserError("whole says which rows of embeddings are kept; set embeddings, too")

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        return (form_of(layer, self.view),)

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> "WhitenedSpectrum":
        """Decompose ``layer``. Raises ``UserError`` for a weight or a moment with NaN or infinity."""
        layer = checked(layer)
        W_OI = to_matrix(layer.weight.detach(), layer, self.view).double()
        moment = moments.get(form_of(layer, self.view))
        if moment is None:
            raise UserError("a whitened decomposition needs the second moment of the layer's inputs")
        moment = moment.to(W_OI)
        if not isinstance(layer, nn.Embedding):
            return WhitenedSpectrum(layer, self.view, *_decomposed(W_OI, moment, self.ridge))
        order, kept = _by_frequency(moment.squeeze(0), self.whole)
        rare = order[kept:]
        return EmbeddingSpectrum(layer, *_decomposed(W_OI[..., rare], moment[:, rare], self.ridge), order, kept)


def _decomposed(W_OI: Tensor, moment: Tensor, ridge: float) -> tuple[linalg.SVD, Tensor]:
    """Factors of W with unit vectors, and what they are ordered by."""
    U_OR, S_R, _ = linalg.svd(linalg.whitened(W_OI, moment, ridge))
    A_RI = U_OR.transpose(-1, -2) @ W_OI
    size_R = A_RI.norm(dim=-1)
    unit = A_RI / size_R.clamp_min(torch.finfo(size_R.dtype).tiny).unsqueeze(-1)
    return linalg.SVD(U_OR, size_R, unit), S_R


def _by_frequency(frequency_I: Tensor, whole: float) -> tuple[Tensor, int]:
    """All ids, the most frequent first, and how many of them make the part ``whole``, never all; where that is nothing
    the ids stay in their order."""
    if not whole:
        return torch.arange(len(frequency_I), device=frequency_I.device), 0
    order = frequency_I.argsort(descending=True, stable=True)
    return order, min(int((frequency_I[order].cumsum(0) < whole).sum()) + 1, len(order) - 1)


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


class EmbeddingSpectrum(WhitenedSpectrum):
    """That of the rows of an embedding that are not kept. ``order``: all ids, those of the ``kept`` rows first.

    Errors and first-order changes are those of the whole embedding, since no other rows change; costs are, too.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, factors: linalg.SVD, importance: Tensor, order: Tensor, kept: int
    ) -> None:
        super().__init__(layer, "channel", factors, importance)
        weight = layer.weight.detach()
        self.order, self.rows, self.norm = order, weight[order[:kept]].clone(), weight.double().norm().cpu()

    @property
    def form(self) -> str:
        return embedding_form(len(self.rows))

    def first_order(self, gradient: Tensor) -> Tensor:
        return super().first_order(gradient[self.order[len(self.rows) :]])

    def relative_error(self) -> Tensor:
        return self.error() / self.norm.clamp_min(1e-300)

    def sizes(self, rank: int) -> tuple[int, ...]:
        return (*super().sizes(rank), self.rows.numel()) if len(self.rows) else super().sizes(rank)

    def rank_within(self, params: float) -> int:
        return max(0, math.floor((params - self.cost(0)) / (self.cost(1) - self.cost(0))))

    def factor(self, keep: Keep) -> nn.Module:
        layer: Any = super().factor(keep)
        if len(self.rows):
            with torch.no_grad():
                layer.whole.weight.copy_(self.rows)
                layer.place[self.order] = torch.arange(len(self.order), dtype=torch.int32, device=self.device)
        return layer
