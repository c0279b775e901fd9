"""Spill tensors to disk, for a model whose decompositions do not all fit into memory."""

import contextlib
import shutil
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectrim.errors import UserError
from spectrim.tools import malloc

PREFIX, LOCK = "spectrim-shelf-", "lock"
NEWBORN = 60.0  # seconds during which a new folder may not have its lock yet


class Shelf:
    """A temporary folder that is deleted when its last reference is dropped. ``TMPDIR`` sets its location.

    A killed process leaves its folder behind, which holds gigabytes for a language model. The next shelf in the same
    location deletes it.
    """

    def __init__(self) -> None:
        self._folder, self._count = Path(mkdtemp(prefix=PREFIX)), 0
        lock = FileLock(self._folder / LOCK)
        with contextlib.suppress(OSError, NotImplementedError):  # Without file locks nobody deletes a leftover folder.
            lock.acquire()  # The system releases the lock however the process ends.
        weakref.finalize(self, _away, self._folder, lock)
        for other in self._folder.parent.glob(f"{PREFIX}*"):
            _away_if_left(other)

    def lay(self, tensors: Mapping[str, Tensor]) -> "Laid":
        """Write ``tensors`` to a new file. Raises ``UserError`` where that fails, as on a full disk."""
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"decompositions could not be laid aside in {path.parent.parent} ({error}): free some room there, set "
                "TMPDIR to another folder, or leave layers_at_once out"
            ) from None
        malloc.give_back()
        return Laid(self, path)


class Laid:
    """A handle to one file of a shelf. It keeps the shelf alive."""

    def __init__(self, shelf: Shelf, path: Path) -> None:
        self._shelf, self._path = shelf, path

    def read(self) -> dict[str, Tensor]:
        """Read the tensors from disk, at every call."""
        malloc.give_back()
        return load_file(self._path)


def _away(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _away_if_left(folder: Path) -> None:
    """Delete the folder of a process that has ended. Skip a folder that cannot be deleted, such as another user's."""
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        if time.time() - folder.stat().st_mtime > NEWBORN:
            lock = FileLock(folder / LOCK, timeout=0)
            lock.acquire()
            _away(folder, lock)
