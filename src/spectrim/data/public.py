"""What the published image sets share: a source and the normalisation; each set states its own constants."""

from typing import ClassVar

from spectrim.data.images import Splits
from spectrim.data.sources import Source, load
from spectrim.data.splits import ImageData, cut
from spectrim.tools.settings import settings


@settings
class PublicSet(ImageData):
    """``source``: where the images come from. ``mean`` and ``std`` of the training set, one a channel, on [0, 1]."""

    source: ClassVar[Source]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        self.check()

    def load(self) -> Splits:
        return cut(self, load(self.source), self.source.name, self.mean, self.std)
