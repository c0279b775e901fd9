"""The 1,797 handwritten digits of scikit-learn, 8x8 grey. They need no download."""

import torch
from sklearn.datasets import load_digits

from spectrim.data.images import Splits
from spectrim.data.sources import Arrays
from spectrim.data.splits import ImageData, split_arrays
from spectrim.tools.settings import settings

MEAN, STD = (0.3055,), (0.3756,)
TEST_FRACTION = 0.2


@settings
class Digits(ImageData):
    """The digits of scikit-learn. The test set is a fixed fifth of them, drawn with seed 0."""

    calibration_size: int = 200
    verification_size: int = 100
    held_out: int = 300

    def load(self) -> Splits:
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test_count = round(TEST_FRACTION * len(labels))
        test, train = order[:test_count].sort().values, order[test_count:].sort().values
        return split_arrays(self, Arrays(images[train], labels[train], images[test], labels[test]), "digits", MEAN, STD)
