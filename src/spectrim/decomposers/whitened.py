"""Activation-whitened SVD: the best approximation of a layer's outputs on calibration data, not of its weight."""

import math

import torch
from torch import Tensor, nn

from spectrim.decomposers import oblique, resumed
from spectrim.decomposers.matrix import Factors, MatrixSpectrum, View, to_matrix
from spectrim.decomposers.spectrum import HEAD, NO_MOMENTS, Embeddings, Moments
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer
from spectrim.factored.forms import EmbeddingForm
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.plan import Keep
from spectrim.tools.settings import settings


@settings
class WhitenedSVD:
    """SVD of ``W C^(1/2)``, where C = E[x x^T] is the second moment of the layer's inputs x (one input a position).

    Truncation to rank k minimises ``E ||W x - W_k x||^2`` over all rank-k matrices. This is exact for a Linear and in
    the channel view. In the spatial view x is a row of kw pixels, and the rows are taken as independent. SVD-LLM (Wang
    et al., arXiv 2403.07378) and BALF (arXiv 2509.25136) do the same with an inverse. Here the kept part of W is
    its projection ``U_k U_k^T W`` on the leading left vectors, so that a singular C does no harm.

    ``view``: as in ``SVD``.
    ``ridge``: is added to C as a fraction of its mean eigenvalue, so that the full rank reproduces W.
    ``samples``: number of calibration samples for C.
    ``embeddings``: as in ``SVD``. An embedding is a Linear whose inputs have a single 1, so C is
        diagonal and holds the frequency of each id. A head that shares its weight counts as well (``tied_factors``).
    ``whole``: the most frequent ids that together make this fraction of all look-ups keep their rows, and only the
        other rows are factored. This is GroupReduce (Chen et al., arXiv 1806.06950) with two groups, the first of full
        rank.
    ``factors``: as in ``SVD``.
    """

    view: View = "spatial"
    ridge: float = 1e-6
    samples: int = 500
    embeddings: Embeddings = False
    whole: float = 0.0
    factors: Factors = "plain"

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise UserError(f"ridge must be above 0, got {self.ridge}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")
        require_whole(self.whole, self.embeddings)

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return (DenseLayer.of(layer).view(self.view),)

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> "WhitenedSpectrum":
        """Decompose ``layer``. Raises ``UserError`` for a weight or a moment with NaN or infinity."""
        dense = DenseLayer.of(layer)
        W_OI = to_matrix(dense.weight.detach(), dense, self.view).double()
        moment = moments.get(dense.view(self.view))
        if moment is None:
            raise UserError("a whitened decomposition needs the second moment of the layer's inputs")
        moment = moment.to(W_OI)
        if not isinstance(layer, nn.Embedding):
            return WhitenedSpectrum(dense, self.view, *whitened_factors(W_OI, moment, self.ridge), self.factors)
        moment, order, whole_rows = by_frequency(moment, self.whole)
        rare = order[whole_rows:]
        if HEAD in moments and moments[HEAD].numel():  # some head is called
            both = tied_factors(W_OI[..., rare], moment[:, rare], moments[HEAD].to(W_OI), self.ridge)
            return ObliqueEmbeddingSpectrum(dense, *both, order, whole_rows, self.factors)
        svd, importance = whitened_factors(W_OI[..., rare], moment[:, rare], self.ridge)
        return EmbeddingSpectrum(dense, svd, importance, order, whole_rows, self.factors)


def whitened_factors(W_OI: Tensor, moment: Tensor, ridge: float) -> tuple[linalg.SVD, Tensor]:
    """Return factors of W with unit vectors, and the values that order the components.

    ``moment``: of the inputs, or only its diagonal. ``ridge``: as in ``WhitenedSVD``.
    """
    U_OR, S_R = resumed.left_vectors(W_OI, moment, ridge)
    A_RI = U_OR.transpose(-1, -2) @ W_OI
    size_R = A_RI.norm(dim=-1)
    unit = A_RI / size_R.clamp_min(torch.finfo(size_R.dtype).tiny).unsqueeze(-1)
    return linalg.SVD(U_OR, size_R, unit), S_R


def tied_factors(W_OI: Tensor, frequency_I: Tensor, H_OO: Tensor, ridge: float) -> tuple[linalg.SVD, Tensor]:
    """Return what ``whitened_factors`` does for an embedding W whose transpose is also the weight of a head.

    Let D be diagonal with the frequency of each id, W the embedding with a row for each id, and h an input of the head.
    A change E of W changes what is looked up by ``tr(E^T D E)`` in the mean, and the scores by ``E h``. The loss feels
    the score of an id about as often as the id is predicted. The Fisher information of a softmax is near its diagonal,
    with entries ``E[p (1 - p)]``. Ids are predicted as often as they are read, so D weighs both uses. Each counts as
    a part of its whole. The decomposition minimises ``tr(D E M E^T)`` for
    ``M = 1 / tr(W^T D W) + E[h h^T] / E[h^T W^T D W h]``. So ``D^(1/2) W M^(1/2)`` is decomposed, as in
    ``TwoSidedSVD``, and M is never singular.

    ``frequency_I``: of each id among the inputs of the embedding. ``H_OO``: the second moment of the head's inputs.

    Raises ``UserError`` for a moment with NaN or infinity.
    """
    linalg.require_finite_moment(H_OO)
    looked_up = (W_OI.square() * frequency_I.unsqueeze(-2)).sum()
    scored = ((H_OO @ W_OI) * W_OI * frequency_I.unsqueeze(-2)).sum()
    tiny = torch.finfo(W_OI.dtype).tiny
    M_OO = torch.eye(H_OO.shape[-1]).to(W_OI) / looked_up.clamp_min(tiny) + H_OO / scored.clamp_min(tiny)
    root_OO, inverse_OO = oblique.roots(M_OO, ridge)
    weighed_OI = root_OO @ W_OI
    U_OR, S_R = resumed.left_vectors(weighed_OI, frequency_I, ridge)
    return oblique.unit(inverse_OO @ U_OR, U_OR.mT @ weighed_OI), S_R


def require_whole(whole: float, embeddings: Embeddings) -> None:
    """Raise ``UserError`` unless ``whole`` is a part of the look-ups of embeddings that are factored."""
    if not 0 <= whole < 1:
        raise UserError(f"whole must lie in [0, 1), got {whole}")
    if whole and not embeddings:
        raise UserError("whole is a fraction of the look-ups of embeddings; set embeddings=true, too")


def by_frequency(frequency_1I: Tensor, whole: float) -> tuple[Tensor, Tensor, int]:
    """Return the frequencies, all ids, the most frequent first, and how many of them keep their rows.

    These make the fraction ``whole`` of all look-ups, but are never all ids. With ``whole`` = 0 the ids stay in their
    order. Where nothing is looked up, a head alone uses the weight, and all ids count alike.
    """
    if not frequency_1I.any():
        frequency_1I = torch.ones_like(frequency_1I) / frequency_1I.shape[-1]
    frequency_I = frequency_1I.squeeze(0)
    if not whole:
        return frequency_1I, torch.arange(len(frequency_I), device=frequency_I.device), 0
    order = frequency_I.argsort(descending=True, stable=True)
    return frequency_1I, order, min(int((frequency_I[order].cumsum(0) < whole).sum()) + 1, len(order) - 1)


class WhitenedSpectrum(MatrixSpectrum):
    """``W = sum_i s_i u_i a_i^T`` with orthonormal u_i, and unit vectors a_i that need not be orthogonal.

    ``importance`` (g, R), the singular values of the whitened weight, orders the components. The s_i need not fall.
    """

    def __init__(self, layer: DenseLayer, view: View, svd: linalg.SVD, importance: Tensor, factors: Factors) -> None:
        super().__init__(layer, view, svd, factors=factors)
        self._importance = importance

    @property
    def importance(self) -> Tensor:
        return self._importance

    def weighted_error(self) -> Tensor:
        """Return, for every rank, the root of the mean squared change of the outputs, summed over outputs."""
        return linalg.tail_sums(self.importance.double().square()).sum(0).sqrt().cpu()


class EmbeddingSpectrum(WhitenedSpectrum):
    """The spectrum of the rows of an embedding that do not stay whole.

    Errors, first-order changes and costs are those of the whole embedding.

    ``order``: all ids, those of the ``whole_rows`` rows first.
    """

    def __init__(
        self,
        layer: DenseLayer,
        svd: linalg.SVD,
        importance: Tensor,
        order: Tensor,
        whole_rows: int,
        factors: Factors,
    ) -> None:
        super().__init__(layer, "channel", svd, importance, factors)
        weight = layer.weight.detach()
        self.order, self.rows, self._norm = order, weight[order[:whole_rows]].clone(), weight.double().norm().cpu()

    def form(self, rank: int) -> EmbeddingForm:
        return EmbeddingForm(len(self.rows), self.is_pivoted(rank))

    def first_order(self, gradient: Tensor) -> Tensor:
        return super().first_order(gradient[self.order[len(self.rows) :]])

    @property
    def norm(self) -> Tensor:
        return self._norm

    def sizes(self, rank: int) -> tuple[int, ...]:
        return (*super().sizes(rank), self.rows.numel()) if len(self.rows) else super().sizes(rank)

    def rank_within(self, params: float) -> int:
        if self.pivoted:
            return super().rank_within(params)
        return max(0, math.floor((params - self.cost(0)) / (self.cost(1) - self.cost(0))))

    def factor(self, keep: Keep) -> FactoredLayer:
        layer = super().factor(keep)
        if len(self.rows):
            assert isinstance(layer, FactoredEmbedding)
            with torch.no_grad():
                layer.whole.weight.copy_(self.rows)
                layer.place[self.order] = torch.arange(len(self.order), dtype=torch.int32, device=self.device)
        return layer


class ObliqueEmbeddingSpectrum(oblique.ObliqueSpectrum, EmbeddingSpectrum):
    """The spectrum of an embedding whose outputs do not count alike: by a head that shares its weight, or by the loss.

    ``weighted_error`` is the root of the sum of both relative squared errors for ``tied_factors``. For ``TwoSidedSVD``
    it is the root of twice the predicted change of the loss.
    """
