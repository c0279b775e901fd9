"""Write files and folders atomically: a crash leaves the old content or the new one, never a part."""

import errno
import itertools
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from spectrim.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
BLOCK_BYTES = 4096  # A full disk refuses a block of this size.
_COUNT = itertools.count()  # for threads that write to one path


@contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of ``paths``, at which the block makes a file or a folder.

    When the block ends, everything is synced to disk and then moved to ``paths``. After an exception nothing is moved.
    The temporary files are removed in both cases. They lie beside ``paths``; a killed process leaves its own, which the
    next writer in the same folder removes.

    Raises ``OSError`` where a file cannot be written.
    """
    temporary = tuple(_temporary(path) for path in paths)
    folders = {path.parent for path in paths}
    try:
        for path in paths:
            _require_no_device_or_folder(path)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            remove_litter(folder)
        yield temporary
        for made in temporary:
            for part in made.rglob("*") if made.is_dir() else [made]:
                _sync(part)
        for made, path in zip(temporary, paths, strict=True):
            os.replace(made, path)
        for folder in folders:
            _sync(folder)
    finally:
        for made in temporary:
            _remove(made)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder inside ``folder``, which is removed when the block ends.

    A killed process leaves it behind; the next writer in ``folder`` removes it. Raises ``OSError`` where it cannot be
    made.
    """
    made = _temporary(folder / "spectrim")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_litter(folder)
        made.mkdir(mode=0o700)
        yield made
    finally:
        _remove(made)


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
            match = re.fullmatch(rf"\..*\.{re.escape(_machine())}\.(\d+)\.\d+\.tmp", path.name)
            if match and not _lives(int(match[1])):
                _remove(path)


def _temporary(path: Path) -> Path:
    # The name is shortened, because file systems limit its length.
    made = path.with_name(f".{path.name[:40]}.{_machine()}.{os.getpid()}.{next(_COUNT)}.tmp")
    _remove(made)  # left by a killed process that had the number of this one
    return made


def _machine() -> str:
    """Return the host's name: a folder may be shared by machines, and only its own machine knows a process."""
    return re.sub(r"\W", "-", platform.node())[:40]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # It lives and belongs to another user.
        return True
    return True


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
