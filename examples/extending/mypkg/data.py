"""Images of stripes, made on the spot."""

import math

import torch
from torch import Tensor

from spectrim.data.images import Splits
from spectrim.data.sources import Arrays
from spectrim.data.splits import ImageData, split_arrays
from spectrim.tools.settings import settings

SIDE = 8


@settings
class Stripes(ImageData):
    """Grey images of 8 x 8 pixels with stripes. The class is the direction of the stripes.

    ``classes``: number of directions.
    """

    calibration_size: int = 200
    verification_size: int = 100
    held_out: int = 300
    classes: int = 4

    def load(self) -> Splits:
        (train, train_labels), (test, test_labels) = self._draw(1000, seed=0), self._draw(400, seed=1)
        return split_arrays(self, Arrays(train, train_labels, test, test_labels), "stripes", (0.5,), (0.35,))

    def _draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return images (count, 1, SIDE, SIDE) of type uint8, and their classes (count,)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (count,), generator=generator)
        phases = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
        noise = 40 * torch.randn(count, SIDE, SIDE, generator=generator)
        angles = (math.pi * labels / self.classes)[:, None, None]
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        waves = torch.sin(1.6 * (rows * angles.sin() + columns * angles.cos()) + phases)
        return (128 + 90 * waves + noise).clamp(0, 255).to(torch.uint8)[:, None], labels
