"""Tensors laid aside on the disk, for a model whose decompositions do not all fit into memory."""

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
NEWBORN = 60.0  # seconds within which a folder may not have its lock yet


class Shelf:
    """A folder among the temporary files (``TMPDIR`` says where) that goes when nobody holds the shelf any more.

    A process that is killed leaves its own, gigabytes of a language model: the next shelf among the same temporary
    files takes it away.
    """

    def __init__(self) -> None:
        self._folder, self._count = Path(mkdtemp(prefix=PREFIX)), 0
        lock = FileLock(self._folder / LOCK)
        with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks: nobody takes it away
            lock.acquire()  # the system lets go of it when the process ends, in whatever way
        weakref.finalize(self, _away, self._folder, lock)
        for other in self._folder.parent.glob(f"{PREFIX}*"):
            _away_if_left(other)

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
        malloc.give_back()
        return Laid(self, path)


class Laid:
    """What lies in one file of a shelf, which is kept as long as this is."""

    def __init__(self, shelf: Shelf, path: Path) -> None:
        self._shelf, self._path = shelf, path

    def read(self) -> dict[str, Tensor]:
        """The tensors, read anew at each call."""
        malloc.give_back()
        return load_file(self._path)


def _away(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()


def _away_if_left(folder: Path) -> None:
    """Remove the shelf of a process that is no more. What cannot be removed, of another user, stays."""
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        if time.time() - folder.stat().st_mtime > NEWBORN:
            lock = FileLock(folder / LOCK, timeout=0)
            lock.acquire()
            _away(folder, lock)
