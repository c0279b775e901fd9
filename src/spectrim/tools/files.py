"""Write files and folders atomically: a crash leaves the old content or the new one, never a part."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from spectrim.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BLOCK_BYTES = 4096  # A full disk refuses a block of this size.
MADE, LOCK = "made", "lock"  # in a hidden folder


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of ``paths``, at which the block makes a file or a folder.

    When the block ends, everything is synced to disk and then moved to ``paths``. After an exception nothing is moved.
    The temporary files are removed in both cases. They lie beside ``paths``, in hidden folders; a killed process leaves
    its own, which the next writer in the same folder removes.

    Raises ``OSError`` where a file cannot be written.
    """
    folders = {path.parent for path in paths}
    for path in paths:
        _require_no_device_or_folder(path)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        remove_litter(folder)
    with ExitStack() as stack:
        temporary = tuple(stack.enter_context(_hidden(path)) / MADE for path in paths)
        yield temporary
        for made in temporary:
            for part in made.rglob("*") if made.is_dir() else [made]:
                _sync(part)
        for made, path in zip(temporary, paths, strict=True):
            os.replace(made, path)
        for folder in folders:
            _sync(folder)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder inside ``folder``, which is removed when the block ends.

    A killed process leaves it behind; the next writer in ``folder`` removes it. Raises ``OSError`` where it cannot be
    made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_litter(folder)
    with _hidden(folder / "spectrim") as hidden:
        (hidden / MADE).mkdir(mode=0o700)
        yield hidden / MADE


def write(files: Mapping[Path, bytes]) -> None:
    """Write several files atomically, either all or none as far as the file system allows.

    Raises ``UserError`` where the disk is full or a folder is read-only.
    """
    path = next(iter(files))
    try:
        with replacing(*files) as temporary:
            for path, made in zip(files, temporary, strict=True):
                made.write_bytes(files[path])
    except OSError as error:
        raise refusal(path, error) from error


def require_writable(*paths: Path, nbytes: int = 0) -> None:
    """Raise ``UserError`` where a file cannot be written at one of ``paths``. Call it before hours of work, not after.

    It writes a block to an unnamed file in the folder of each path. Where that folder does not exist, the nearest
    folder above it is tried. Nothing is left behind.

    ``nbytes``: size of what is going to be written, which must fit on the disk.
    """
    for path in paths:
        try:
            _require_no_device_or_folder(path)
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            with TemporaryFile(dir=folder) as file:
                file.write(bytes(BLOCK_BYTES))
                file.flush()
                os.fsync(file.fileno())
            if nbytes > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, f"{nbytes / 2**20:,.0f} MiB do not fit on the disk")
        except OSError as error:
            raise refusal(path, error) from None


def discard(path: Path) -> None:
    """Remove a file that nobody needs any more, if it is there. A disk that refuses costs no result."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ``ValueError`` where it is not JSON or holds NaN, and ``OSError``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def listed(folder: Path) -> list[Path]:
    """Return what lies in ``folder``, sorted. ``Path.glob`` would find nothing in a folder that cannot be listed.

    Raises ``UserError`` where it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror or error}; make it readable") from None


def refusal(path: Path, error: OSError) -> UserError:
    """Return the error that tells a person why ``path`` cannot be written."""
    # Another file may be at fault, such as one that is read while this one is written.
    named = error.filename if isinstance(error.filename, str) else None
    other = f" ({named})" if named and Path(named).parent != path.parent else ""
    reason = f"{error.strerror or error}{other}"
    advice = "free some space or choose a writable folder"
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # since this process looked
        advice = "another run may have written it; choose another name"
    return UserError(f"cannot write {path}: {reason}; {advice}")


def remove_litter(folder: Path) -> None:
    """Remove what killed processes of this machine left in ``folder``."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if re.fullmatch(rf"\..*\.{re.escape(_machine())}\.[0-9a-f]{{16}}\.tmp", path.name):
                _remove_if_left(path)


def _remove_if_left(hidden: Path) -> None:
    """Remove a folder of ``_hidden`` whose lock nobody holds."""
    if hidden.is_symlink():  # made by somebody who wants another folder to be removed
        return
    with suppress(OSError):  # killed before it had a lock; the folder is then empty
        hidden.rmdir()
    with suppress(OSError):
        lock = os.open(hidden / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(hidden / MADE)  # first, because a folder without a lock would stay
            _remove(hidden)
        finally:
            os.close(lock)


@contextmanager
def _hidden(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``path`` for what will be moved to it. Remove it when the block ends.

    It holds a locked file as long as this process lives. The number of a process would tell less: a container has its
    own numbers, and often the name of its machine. Where a file system has no locks, nobody removes what is left.
    """
    hidden, lock = _locked_folder(path)
    try:
        yield hidden
    finally:
        _remove(hidden / MADE)
        _remove(hidden)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor of its lock."""
    while True:
        # The name is shortened, because file systems limit its length.
        hidden = path.with_name(f".{path.name[:40]}.{_machine()}.{os.urandom(8).hex()}.tmp")
        try:
            hidden.mkdir()
            with suppress(FileNotFoundError):  # another process has taken the folder for litter before it was locked
                lock = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if _is_file_of(lock, hidden / LOCK):
                    return hidden, lock
                os.close(lock)
        except KeyboardInterrupt:
            _remove(hidden)
            raise


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _machine() -> str:
    """Return the host's name. Some file systems that machines share lock files on each machine alone."""
    return re.sub(r"\W", "-", platform.node())[:40]


def _require_no_device_or_folder(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EEXIST, "a folder or a device has this name")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # Not every file system can sync a folder.
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there. No failure here may hide the error of a write."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
