"""Base class of the published image sets. Each set defines its source and its normalisation."""

from typing import ClassVar

from spectrim.data.images import Splits
from spectrim.data.sources import Source, load
from spectrim.data.splits import ImageData, split_arrays
from spectrim.tools.settings import settings


@settings
class PublicSet(ImageData):
    """A published image set.

    ``source``: source of the images.
    ``mean``, ``std``: statistics of the training set, one value per channel, on the scale [0, 1].
    """

    source: ClassVar[Source]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def load(self) -> Splits:
        return split_arrays(self, load(self.source), self.source.name, self.mean, self.std)
