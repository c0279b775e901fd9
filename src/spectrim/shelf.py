"""Tensors laid aside on the disk, for a model whose decompositions do not all fit into memory."""

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim import heap
from spectrim.errors import UserError


class Shelf:
    """A folder among the temporary files (``TMPDIR`` says where) that goes when nobody holds the shelf any more."""

    def __init__(self) -> None:
        self._folder, self._count = Path(mkdtemp(prefix="spectrim-")), 0
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def lay(self, tensors: Mapping[str, Tensor]) -> "Laid":
        """Write them. Raises ``UserError`` where the disk is full."""
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"decompositions could not be laid aside in {path.parent.parent} ({error}): free some room there, set "
                "TMPDIR to another folder, or leave layers_at_once out"
            ) from None
        heap.give_back()
        return Laid(self, path)


class Laid:
    """What lies in one file of a shelf, which is kept as long as this is."""

    def __init__(self, shelf: Shelf, path: Path) -> None:
        self._shelf, self._path = shelf, path

    def read(self) -> dict[str, Tensor]:
        """The tensors, read anew at each call."""
        heap.give_back()
        return load_file(self._path)
