"""The better view of each convolution, channel or spatial, at equal cost."""

from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn

from spectrim.decomposers.matrix import View, checked
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments, Spectrum
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.tools.settings import settings


@settings
class BestView:
    """``base`` in the view that loses less, for each convolution by itself; its own ``view`` is not looked at.

    A view loses, at a number of parameters, the relative squared ``weighted_error`` of the largest rank that fits into
    it; compared are the means over all numbers below that of the dense weight, so that views whose ranks cost different
    numbers of parameters meet at equal cost. At equality, and for a Linear and a 1x1 convolution, which have one form
    only, it is the channel view. Where ``base`` whitens, both moments are gathered and each view is weighed as it
    weighs itself: the spatial one takes the rows of a patch for independent.
    """

    base: SVD | WhitenedSVD = SVD()

    @property
    def samples(self) -> int:
        return self.base.samples

    @property
    def embeddings(self) -> bool:
        return self.base.embeddings

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        return tuple(form for candidate in self._candidates(layer) for form in candidate.forms(layer))

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> Spectrum:
        """Decompose ``layer`` in each view, keep the better. Raises ``UserError`` as ``base`` does."""
        layer = checked(layer)
        spectra = [candidate.spectrum(layer, moments) for candidate in self._candidates(layer)]
        return min(spectra, key=lambda spectrum: mean_loss(spectrum, layer.weight.numel()))

    def _candidates(self, layer: nn.Module) -> list[SVD | WhitenedSVD]:
        several = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        views: tuple[View, ...] = ("channel", "spatial") if several else ("channel",)
        return [replace(self.base, view=view) for view in views]


def mean_loss(spectrum: Spectrum, params: int) -> float:
    """The mean, over all budgets from 0 to ``params``, of the relative squared error of the largest rank within.

    Of a step function of the budget that begins at 1, where not even one component fits; 0 for a zero weight.
    """
    energy: Tensor = spectrum.weighted_error().square()
    relative = (energy / energy[0].clamp_min(1e-300)).tolist()
    steps = [min(spectrum.cost(rank), params) for rank in range(spectrum.max_rank + 1)] + [params]
    return sum(loss * (end - start) for loss, (start, end) in zip(relative, pairwise(steps), strict=True)) / params
