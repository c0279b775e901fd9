"""Fetch public image sets once, verify them, and keep them as safetensors in the user's cache folder.

Each set has several routes to the same data, the official one first. A sha256 pins every downloaded file and the
decoded arrays, so every route gives bit-identical images and labels or fails. Nothing is unpickled.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spectrim.errors import UserError
from spectrim.fetch.cache import cache_folder, placed, writing
from spectrim.fetch.download import Download, Unavailable
from spectrim.tools import files

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Arrays:
    """The published training set and test set: images, uint8 (N, C, H, W), and labels, int64 (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def named(self) -> dict[str, Tensor]:
        """Return the four arrays by field name."""
        return {
            "train_images": self.train_images,
            "train_labels": self.train_labels,
            "test_images": self.test_images,
            "test_labels": self.test_labels,
        }

    def sha256(self) -> str:
        """Return the sha256 over the little-endian bytes of the four arrays, in field order."""
        sha = hashlib.sha256()
        for array in self.named().values():
            sha.update(array.contiguous().numpy().data)
        return sha.hexdigest()


@dataclass(frozen=True)
class Route:
    """One way to get a data set.

    ``files``: the files to fetch.
    ``decode``: function that converts their paths, in the same order, to arrays.
    """

    files: tuple[Download, ...]
    decode: Callable[[Sequence[Path]], Arrays]


@dataclass(frozen=True)
class Source:
    """A data set: its routes in the order of trial, and the sha256 of its arrays."""

    name: str
    routes: tuple[Route, ...]
    sha256: str


def load(source: Source) -> Arrays:
    """Return the arrays of ``source`` from the cache; fetch them first if they are missing.

    Raises ``UserError`` where the cache file is damaged, every route fails, the disk is full, or the folder is not
    writable.
    """
    folder = cache_folder()
    kept = folder / f"{source.name}.safetensors"
    if not kept.exists():
        with writing(folder, source.name):
            if not kept.exists():  # another process may have fetched it while this one waited
                _fetch_into(kept, source)
    return _read(kept, source)


def _read(kept: Path, source: Source) -> Arrays:
    try:
        arrays = Arrays(**load_file(kept))
    except (SafetensorError, TypeError) as error:
        raise UserError(f"{kept} is truncated or no data set ({error}); delete it and run again") from None
    except OSError as error:
        raise UserError(f"{kept} cannot be read: {error.strerror or error}") from None
    if arrays.sha256() != source.sha256:
        raise UserError(f"{kept} does not hold {source.name}: its content was altered; delete it and run again")
    return arrays


def _fetch_into(kept: Path, source: Source) -> None:
    with files.scratch(kept.parent) as folder, files.replacing(kept) as (made,):
        arrays = _first_that_works(source, folder, kept.parent / "downloads")
        if arrays.sha256() != source.sha256:
            raise UserError(f"{source.name} decodes to other images or labels than expected; nothing was kept")
        made.write_bytes(save({name: array.contiguous() for name, array in arrays.named().items()}))


def _first_that_works(source: Source, folder: Path, by_hand: Path) -> Arrays:
    failures = []
    for route in source.routes:
        try:
            paths = [placed(file, by_hand) or file.fetch(folder) for file in route.files]
        except Unavailable as failure:
            LOG.warning("%s: %s", source.name, failure)
            failures.append(str(failure))
            continue
        return route.decode(paths)
    choices = ", or ".join(" and ".join(file.by_hand for file in route.files) for route in source.routes)
    raise UserError(
        f"{source.name} could not be fetched: {'; '.join(failures)}. "
        f"By hand: put into {by_hand} {choices}; then run again"
    )
