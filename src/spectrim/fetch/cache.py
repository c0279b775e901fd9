"""The user's cache folder. Fetched files are written there atomically and checked at each use."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from spectrim.errors import UserError
from spectrim.fetch.download import Download, Package, Unavailable
from spectrim.tools import digests, files

LOCK_SECONDS = 3600.0


def cache_folder() -> Path:
    """Return ``$SPECTRIM_DATA`` if it is set, else ``spectrim`` in the user's cache folder."""
    own = os.environ.get("SPECTRIM_DATA")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spectrim"


@contextmanager
def writing(folder: Path, name: str) -> Iterator[None]:
    """Lock ``folder`` for ``name`` against other processes while the block writes to it.

    Raises ``UserError`` where the lock is not free within an hour, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise UserError(f"another process has been fetching {name} into {folder} for an hour; end it first") from None
    except OSError as error:
        reason = f"{name} cannot be kept in {folder} ({error.strerror or error}): make it writable"
        if error.errno in files.NO_ROOM:
            reason = f"no room on the disk for {name} in {folder}, so nothing was kept: free some"
        raise UserError(f"{reason}, or set SPECTRIM_DATA to another folder") from None


def placed(file: Download, by_hand: Path) -> Path | None:
    """Return the path of ``file`` in the folder ``by_hand`` of manual downloads, or None.

    Raises ``Unavailable`` where its sha256 differs.
    """
    path = by_hand / file.file
    if not path.exists():
        return None
    if digests.of_file(path) != file.sha256:
        raise Unavailable(f"{path} is truncated or another file than expected (its sha256 differs): replace it")
    return path


@dataclass(frozen=True)
class Bundle:
    """Files that are made from one registry package.

    ``make``: called as ``make(archive, folder)``; writes the files into ``folder``.
    ``sha256``: digest of each of the files, by name in ``folder``.
    """

    name: str
    package: Package
    make: Callable[[Path, Path], None]
    sha256: Mapping[str, str]


def unpacked(bundle: Bundle) -> Path:
    """Return the cache folder with the files of ``bundle``; fetch them first if they are missing.

    Raises ``UserError`` where a file is missing, altered or added, the package cannot be fetched, or the disk is full.
    """
    folder = cache_folder()
    kept = folder / bundle.name
    if not kept.exists():
        with writing(folder, bundle.name):
            if not kept.exists():  # another process may have fetched it while this one waited
                _make(bundle, kept)
    for name in _not_as_pinned(kept, bundle.sha256):
        raise UserError(f"{kept / name} is missing, added, truncated or altered; delete {kept} and run again")
    return kept


def _not_as_pinned(folder: Path, pinned: Mapping[str, str]) -> Iterator[str]:
    """Yield the files in ``folder`` that are missing, not pinned, or have another sha256. It skips hidden files."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    yield from sorted(there ^ pinned.keys())
    for name, sha256 in pinned.items():
        if not (folder / name).is_file() or digests.of_file(folder / name) != sha256:
            yield name


def _make(bundle: Bundle, kept: Path) -> None:
    with files.scratch(kept.parent) as folder, files.replacing(kept) as (made,):
        try:
            archive = placed(bundle.package, kept.parent / "downloads") or bundle.package.fetch(folder)
        except Unavailable as failure:
            raise UserError(
                f"{bundle.name} could not be fetched: {failure}. "
                f"By hand: put into {kept.parent / 'downloads'} {bundle.package.by_hand}; then run again"
            ) from None
        made.mkdir()
        bundle.make(archive, made)
        for name in _not_as_pinned(made, bundle.sha256):
            raise UserError(
                f"{bundle.name}: {name} comes out otherwise than expected, so nothing was kept; "
                "install the versions that the lock files of this project name"
            )


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Extract members of a wheel or a gzipped tar into ``folder``.

    ``members``: path in the archive → file name in ``folder``.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for path, name in members.items():
                with wheel.open(path) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        return
    with tarfile.open(archive) as tar:
        for path, name in members.items():
            file = tar.extractfile(path)
            assert file is not None, f"{path} is not a file of {archive.name}"
            with file, (folder / name).open("wb") as target:
                shutil.copyfileobj(file, target)
