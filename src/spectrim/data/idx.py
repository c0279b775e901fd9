"""The idx format of MNIST and its successors: big-endian sizes, then unsigned bytes."""

import gzip
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spectrim.data.sources import Arrays, Route, Source
from spectrim.fetch.download import Package, Url

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def parse(content: bytes) -> Tensor:
    """Return the uint8 array of an idx file. Raises ``ValueError`` where the content is not idx."""
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if zeros != 0 or kind != 0x08 or len(content) - start != math.prod(shape):
        raise ValueError("not an idx file of unsigned bytes")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


def arrays_of(contents: Sequence[bytes]) -> Arrays:
    """Convert training images, training labels, test images and test labels to arrays with one channel."""
    train_images, train_labels, test_images, test_labels = (parse(content) for content in contents)
    return Arrays(train_images.unsqueeze(1), train_labels.long(), test_images.unsqueeze(1), test_labels.long())


def decode_gzipped(paths: Sequence[Path]) -> Arrays:
    """Decode the four published files, in the order of ``FILES``."""
    return arrays_of([gzip.decompress(path.read_bytes()) for path in paths])


def source(
    name: str,
    site: str,
    published: Mapping[str, int],
    package: Package,
    decode_package: Callable[[Sequence[Path]], Arrays],
    sha256: str,
) -> Source:
    """Return the source of a data set of the four ``FILES``.

    ``site``: address of the folder with the files.
    ``published``: sha256 and size in bytes of each file.
    ``package``: package that holds the same data, which ``decode_package`` decodes.
    ``sha256``: digest of the decoded arrays.
    """
    files = tuple(Url(site + file, *known) for file, known in zip(FILES, published.items(), strict=True))
    return Source(name, (Route(files, decode_gzipped), Route((package,), decode_package)), sha256)
