"""Split a data set into train, calibration, verification and test.

For n training images ``order = randperm(n)`` uses a generator with the fixed seed 0. The first ``held_out`` indices are
the held-out pool, which no training uses; the others are the train split. A generator with seed ``calibration_seed``
draws the calibration and verification images from one pool without replacement, so they are disjoint. All index sets
are sorted in ascending order.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectrim.data.images import ImageSplit, Split, Splits
from spectrim.data.sources import Arrays
from spectrim.data.text import TextSplit
from spectrim.errors import UserError

POOLS = ("held_out", "train", "test")


@dataclass(frozen=True)
class Pools:
    """The settings of the splits of a data set.

    ``calibration_size``: number of images on which an algorithm computes gradients.
    ``verification_size``: number of other images, on which it measures losses.
    ``held_out``: number of training images that are kept from training.
    ``calibration_from``: pool of both draws. ``held_out`` is the default, and ``train`` is the network's training data.
    ``test`` leaks the test set into the selection; it exists only to measure the effect of that leak.
    """

    calibration_size: int = 2000
    verification_size: int = 1000
    calibration_seed: int = 0
    held_out: int = 5000
    batch_size: int = 100
    calibration_from: str = "held_out"

    noun: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        if self.calibration_from not in POOLS:
            raise UserError(f"calibration_from is one of {', '.join(POOLS)}, got {self.calibration_from!r}")
        if self.calibration_size < 1:
            raise UserError(f"calibration_size must be at least 1, got {self.calibration_size}")
        if self.verification_size < 0:
            raise UserError(f"verification_size must be at least 0, got {self.verification_size}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class ImageData(Pools, ABC):
    """A labelled image set and the settings of its splits."""

    @abstractmethod
    def load(self) -> Splits:
        """Return the four splits. Raises ``UserError`` where data are unavailable or the settings do not fit them."""


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """Sorted index sets. ``train`` indexes the training set.

    ``calibration``, ``verification``: indices into the test set if ``from_test``, else into the training set.
    """

    train: Tensor
    calibration: Tensor
    verification: Tensor
    from_test: bool


def draw_indices(data: Pools, train_count: int, test_count: int) -> SplitIndices:
    """Draw the indices of the splits. Raises ``UserError`` where a pool is too small."""
    if not 0 <= data.held_out < train_count:
        raise UserError(
            f"held_out must lie in 0..{train_count - 1}: some training {data.noun} must be left; got {data.held_out}"
        )
    order = torch.randperm(train_count, generator=torch.Generator().manual_seed(0))
    held_out, train = order[: data.held_out].sort().values, order[data.held_out :].sort().values
    pool = {"held_out": held_out, "train": train, "test": torch.arange(test_count)}[data.calibration_from]
    wanted = data.calibration_size + data.verification_size
    if wanted > len(pool):
        extra = f" with verification_size {data.verification_size}" if data.verification_size else ""
        raise UserError(
            f"calibration_size {data.calibration_size}{extra} is more than the {len(pool)} {data.noun} of "
            f"{data.calibration_from}"
        )
    shuffled = torch.randperm(len(pool), generator=torch.Generator().manual_seed(data.calibration_seed))
    calibration, verification = (
        pool[part.sort().values] for part in shuffled[:wanted].tensor_split([data.calibration_size])
    )
    return SplitIndices(train, calibration, verification, from_test=data.calibration_from == "test")


def split_arrays(data: ImageData, arrays: Arrays, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Splits:
    """Split ``arrays`` by the settings in ``data``.

    ``mean``, ``std``: statistics of the training set, one value per channel, on the scale [0, 1].
    """
    indices = draw_indices(data, len(arrays.train_labels), len(arrays.test_labels))
    whole = ImageSplit(arrays.train_images, arrays.train_labels, mean, std, data.batch_size, f"{name} train")
    test = ImageSplit(arrays.test_images, arrays.test_labels, mean, std, data.batch_size, f"{name} test")
    source = test if indices.from_test else whole
    train = whole.subset(indices.train, whole.name)
    calibration = source.subset(indices.calibration, f"{name} calibration")
    verification = source.subset(indices.verification, f"{name} verification")
    return Splits(
        name=name,
        train=train,
        calibration=calibration,
        verification=verification,
        test=test,
        num_classes=int(arrays.train_labels.max()) + 1,
        in_channels=arrays.train_images.shape[1],
        image_size=arrays.train_images.shape[-1],
        digest=digest_of(train, calibration, verification, test),
    )


def digest_if_known(batches: Any) -> str | None:
    """Return the digest of a split of this library; None for other batches, whose content nothing tells."""
    return batches.digest() if isinstance(batches, ImageSplit | TextSplit) else None


def digest_of(*splits: Split) -> str:
    """Return the sha256 over the digests of the splits, in this order."""
    return hashlib.sha256("".join(split.digest() for split in splits).encode()).hexdigest()
