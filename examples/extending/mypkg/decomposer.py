"""Plain SVD in a view that the size of the kernel decides."""

from typing import ClassVar

from torch import nn

from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.spectrum import NO_MOMENTS, Moments
from spectrim.decomposers.svd import SVD
from spectrim.tools.settings import settings


@settings
class ByShape:
    """The spatial view for kernels of at least ``side`` pixels a side, the channel view for the others."""

    side: int = 3

    samples: ClassVar[int] = 0
    embeddings: ClassVar[bool] = False

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        return ()

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> MatrixSpectrum:
        large = max(getattr(layer, "kernel_size", (1,))) >= self.side
        return SVD("spatial" if large else "channel").spectrum(layer)
