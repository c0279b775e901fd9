"""Enlarged test images of CIFAR-10: natural images that networks for ImageNet have not seen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.data.cifar10 import SOURCE
from spectrim.data.images import Splits
from spectrim.data.sources import Arrays, load
from spectrim.data.splits import ImageData, split_arrays
from spectrim.errors import UserError
from spectrim.tools.imagenet import MEAN, STD
from spectrim.tools.settings import settings

SIZE = 10_000


@settings
class UpscaledCIFAR10(ImageData):
    """The first test images of CIFAR-10, enlarged by bilinear interpolation and normalised as those of ImageNet.

    Their labels are the ten classes of CIFAR-10. The splits are drawn from the same images, so only the test split is
    of use, to compare predictions without labels.

    ``test_size``: number of images.
    ``image_size``: side of an enlarged image, in pixels.
    """

    calibration_size: int = 20
    verification_size: int = 0
    held_out: int = 0
    batch_size: int = 20
    calibration_from: str = "test"
    test_size: int = 200
    image_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.test_size <= SIZE:
            raise UserError(f"test_size must lie in 1..{SIZE}, got {self.test_size}")
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")

    def load(self) -> Splits:
        found = load(SOURCE)
        images, labels = self._enlarged(found.test_images[: self.test_size]), found.test_labels[: self.test_size]
        return split_arrays(self, Arrays(images, labels, images, labels), "upscaled_cifar10", MEAN, STD)

    def _enlarged(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        return F.interpolate(images.float(), size, mode="bilinear").round().to(torch.uint8)
