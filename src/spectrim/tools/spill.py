"""Spill tensors to disk, for a model whose decompositions do not all fit into memory."""

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.errors import UserError
from spectrim.tools import files, malloc


class SpillFolder:
    """A temporary folder for tensors, deleted when the folder and all tensors in it are no longer referenced.

    ``TMPDIR`` sets its location. A killed process leaves its folder behind, which holds gigabytes for a language model.
    The next spill folder in the same location deletes it.
    """

    def __init__(self) -> None:
        stack = ExitStack()
        try:
            self._folder, self._count = stack.enter_context(files.scratch(Path(gettempdir()))), 0
        except OSError as error:
            raise _refusal(Path(gettempdir()), error) from None
        weakref.finalize(self, stack.close)

    def write(self, tensors: Mapping[str, Tensor]) -> "SpilledTensors":
        """Write ``tensors`` to a new file of the folder. Raises ``UserError`` where that fails, as on a full disk."""
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise _refusal(path.parent.parent, error) from None
        malloc.give_back()
        return SpilledTensors(self, path)


class SpilledTensors:
    """Tensors in one file of a spill folder. They keep the folder on disk."""

    def __init__(self, folder: SpillFolder, path: Path) -> None:
        self._folder, self._path = folder, path

    def read(self) -> dict[str, Tensor]:
        """Read the tensors from disk. Each call reads them again."""
        malloc.give_back()
        return load_file(self._path)


def _refusal(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot spill decompositions to {folder} ({error}): free some space there, set TMPDIR to another folder, or "
        "leave layers_at_once out"
    )
