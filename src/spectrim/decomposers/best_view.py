"""The better view of each convolution, channel or spatial, at equal cost."""

from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn

from spectrim.decomposers.matrix import View
from spectrim.decomposers.spectrum import NO_MOMENTS, Directions, Embeddings, Moments, Spectrum, directions_of
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.factored.dense import DenseLayer
from spectrim.tools.settings import settings


@settings
class BestView:
    """Decompose each convolution by ``base`` in the view with the smaller mean loss. The view of ``base`` is ignored.

    At a number of parameters, the loss of a view is the relative squared ``weighted_error`` of the largest rank within
    it. The mean is over all numbers of parameters below that of the dense weight, because ranks of the two views cost
    different numbers of them. On a tie the channel view wins. A Linear and a 1x1 convolution have one view only.

    If ``base`` whitens, the moments of both views are taken. Its spatial view assumes that the rows of a patch are
    independent.
    """

    base: SVD | WhitenedSVD | TwoSidedSVD = SVD()

    @property
    def samples(self) -> int:
        return self.base.samples

    @property
    def embeddings(self) -> Embeddings:
        return self.base.embeddings

    @property
    def directions(self) -> Directions | None:
        return directions_of(self.base)

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return tuple(view for candidate in self._candidates(layer) for view in candidate.views(layer))

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> Spectrum:
        """Decompose ``layer`` in each view and return the better spectrum. Raises ``UserError`` as ``base`` does."""
        params = DenseLayer.of(layer).weight.numel()
        spectra = [candidate.spectrum(layer, moments) for candidate in self._candidates(layer)]
        return min(spectra, key=lambda spectrum: mean_loss(spectrum, params))

    def _candidates(self, layer: nn.Module) -> list[SVD | WhitenedSVD | TwoSidedSVD]:
        several = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        views: tuple[View, ...] = ("channel", "spatial") if several else ("channel",)
        return [replace(self.base, view=view) for view in views]


# The least harm at a number of parameters, of all decomposers here.
PIVOTED = BestView(WhitenedSVD(factors="pivoted"))


def mean_loss(spectrum: Spectrum, params: int) -> float:
    """Return the mean relative squared error of the largest rank within a budget, over budgets from 0 to ``params``.

    The error is a step function of the budget. It is 1 where not even one component fits, and 0 for a zero weight.
    """
    energy: Tensor = spectrum.weighted_error().square()
    relative = (energy / energy[0].clamp_min(1e-300)).tolist()
    steps = [min(spectrum.cost(rank), params) for rank in range(spectrum.max_rank + 1)] + [params]
    return sum(loss * (end - start) for loss, (start, end) in zip(relative, pairwise(steps), strict=True)) / params
