"""SVD of a layer whitened on both sides: by what goes in, and by how much the loss feels what comes out."""

import torch
from torch import Tensor, nn

from spectrim.decomposers import oblique, resumed
from spectrim.decomposers.matrix import Factors, View, to_matrix
from spectrim.decomposers.spectrum import HEAD, NO_MOMENTS, Directions, Embeddings, Moments, outputs_of
from spectrim.decomposers.whitened import ObliqueEmbeddingSpectrum, WhitenedSpectrum, by_frequency, require_whole
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.dense import DenseLayer
from spectrim.tools.settings import settings


@settings
class TwoSidedSVD:
    """SVD of ``G^(1/2) W C^(1/2) = U S V^T``, with second moments C of inputs and G of gradients at outputs.

    The rank-k matrix ``G^(-1/2) U_k U_k^T G^(1/2) W`` then changes the loss least, to second order and with K-FAC's
    Fisher information (``output_moments``). ``WhitenedSVD`` is the case G = 1. This is the basis of KFAC-SVD (LEMS,
    arXiv 2610.32878) and, with ``top``, that of IO-SVD (arXiv 2605.15626). C is never inverted, and G only with
    ``damping``, so singular moments do no harm.

    ``view``, ``factors``: as in ``SVD``.
    ``ridge``: is added to C as a fraction of its mean eigenvalue, as in ``WhitenedSVD``.
    ``damping``: is added to G as a fraction of its mean eigenvalue. The larger, the closer to ``WhitenedSVD``.
    ``samples``: number of calibration samples for C, and of those for G.
    ``labels``: take the gradients of the loss at the given targets. By default they are those of random directions of
        the scores, whose second moment is the Fisher information of the model's own predictions, without labels.
    ``top``: only this many of the highest scores of each prediction count; None: all. Not with ``labels``.
    ``seed``: seed of the random directions.
    ``embeddings``: as in ``SVD``. C then is the frequency of each id. Where a head shares the
        weight W, the score of an id counts as often as the id, since ids are predicted about as often as they are read.
        With H the second moment of the head's inputs, G + H then takes the place of G.
    ``whole``: as in ``WhitenedSVD``.
    """

    view: View = "spatial"
    ridge: float = 1e-6
    damping: float = 0.1
    samples: int = 500
    labels: bool = False
    top: int | None = None
    seed: int = 0
    factors: Factors = "plain"
    embeddings: Embeddings = False
    whole: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ridge", "damping"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")
        if self.top is not None and self.top < 2:
            raise UserError(f"top must be at least 2, got {self.top}: a single score has no alternative")
        if self.top is not None and self.labels:
            raise UserError("top chooses among the model's own scores; set labels=false, too")
        require_whole(self.whole, self.embeddings)

    @property
    def directions(self) -> Directions:
        return Directions(self.labels, self.top, self.seed)

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return (DenseLayer.of(layer).view(self.view),)

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> WhitenedSpectrum:
        """Decompose ``layer``. Raises ``UserError`` for a weight or a moment with NaN or infinity."""
        dense = DenseLayer.of(layer)
        view = dense.view(self.view)
        W_OI = to_matrix(dense.weight.detach(), dense, self.view).double()
        if view not in moments or outputs_of(view) not in moments:
            raise UserError("a two-sided decomposition needs the second moments of a layer's inputs and gradients")
        C, G_OO = moments[view].to(W_OI), moments[outputs_of(view)].to(W_OI)
        if not torch.isfinite(G_OO).all():
            raise UserError(
                "the gradients at the outputs of a layer hold NaN or infinity; check the model's weights and the data"
            )
        if not isinstance(layer, nn.Embedding):
            # Any root will do: they differ by a rotation of U.
            factors = _factors(W_OI, C, oblique.triangular_root(G_OO, self.damping), self.ridge)
            return TwoSidedSpectrum(dense, self.view, *factors, self.factors)
        frequency, order, whole_rows = by_frequency(C, self.whole)
        rare = order[whole_rows:]
        root_OO = oblique.triangular_root(self._metric(G_OO, moments), self.ridge)
        factors = _factors(W_OI[..., rare], frequency[:, rare], root_OO, self.ridge)
        return ObliqueEmbeddingSpectrum(dense, *factors, order, whole_rows, self.factors)

    def _metric(self, G_OO: Tensor, moments: Moments) -> Tensor:
        """Return how much the outputs of an embedding count: damped G, and H where a head has the same weight."""
        floor = linalg.floor_of(G_OO.diagonal(dim1=-2, dim2=-1), self.damping)
        damped_OO = G_OO + torch.diag_embed(floor.expand(G_OO.shape[:-1]))
        if HEAD not in moments or not moments[HEAD].numel():  # no head, or one that is never called
            return damped_OO
        H_OO = moments[HEAD].to(G_OO)
        linalg.require_finite_moment(H_OO)
        return damped_OO + H_OO


def _factors(W_OI: Tensor, C: Tensor, root_OO: Tensor, ridge: float) -> tuple[linalg.SVD, Tensor]:
    """Return the components of W, whitened by C and a root of G, and the values that order them."""
    weighed_OI = root_OO @ W_OI
    U_OR, S_R = resumed.left_vectors(weighed_OI, C, ridge)
    return oblique.unit(torch.linalg.solve(root_OO, U_OR), U_OR.mT @ weighed_OI), S_R


class TwoSidedSpectrum(oblique.ObliqueSpectrum, WhitenedSpectrum):
    """``W = sum_i s_i b_i a_i^T`` with unit vectors b_i and a_i, none of which need be orthogonal.

    ``weighted_error`` is the root of twice the predicted change of the loss.
    """
