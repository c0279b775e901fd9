"""In-memory image sets, and the splits of a data set."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.errors import UserError

Batch = tuple[Tensor, Tensor]


class Split(Protocol):
    """The interface of a split: repeated iteration over batches, and a digest of its content."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (N,), in the order of the batches."""
        ...

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches ``(inputs, targets)``, always in the same order."""
        ...

    def digest(self) -> str:
        """Return a sha256 that identifies the content."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Labelled images that can be iterated repeatedly as batches ``(inputs, targets)``.

    The batches are float32, normalised, and in the order of the set; the last one may be shorter.

    ``images``: uint8, shape (N, C, H, W).
    ``labels``: int64, shape (N,).
    ``mean``, ``std``: one value per channel, on the scale [0, 1].
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int = 500
    name: str = "images"

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise UserError(f"{self.name}: images must be uint8 of shape (N, C, H, W), got {tuple(self.images.shape)}")
        if len(self.images) != len(self.labels):
            raise UserError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")
        if self.batch_size < 1:
            raise UserError(f"{self.name}: batch_size must be at least 1, got {self.batch_size}")

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.labels), self.batch_size):
            stop = start + self.batch_size
            yield self.normalise(self.images[start:stop]), self.labels[start:stop]

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (N, C, H, W) to float32 by ``mean`` and ``std``."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def subset(self, indices: Tensor, name: str) -> "ImageSplit":
        """Return the images at ``indices``, in that order."""
        return ImageSplit(self.images[indices], self.labels[indices], self.mean, self.std, self.batch_size, name)

    def digest(self) -> str:
        """Return the sha256 of the bytes of images and labels."""
        sha = hashlib.sha256(self.images.contiguous().numpy().data)
        sha.update(self.labels.contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Splits:
    """The four splits of one data set.

    An algorithm never sees ``test``. ``verification`` may be empty.

    ``digest``: sha256 over the digests of all four splits.
    ``description``: further information in words.
    ``loss``: the loss that fits the labels.
    """

    name: str
    train: Split
    calibration: Split
    verification: Split
    test: Split
    num_classes: int
    in_channels: int
    image_size: int
    digest: str = field(default="")
    description: str = ""
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
