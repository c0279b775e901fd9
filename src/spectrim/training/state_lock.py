"""A lock on a state file, so that two processes never continue the same training."""

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from spectrim.errors import UserError
from spectrim.tools import files

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # raised by file systems without locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the state file ``path`` against other processes while the block runs.

    The system frees the lock of a killed process. On a file system without locks nothing is locked.

    Raises ``UserError`` where another process holds the lock, ``path`` is a folder, or its folder is not writable.
    """
    if path.is_dir():
        raise UserError(f"the state {path} is a folder; give the path of a file")
    place = path.with_name(f".{path.name[:200]}.lock")
    lock = _acquired(path, place)
    try:
        if lock:
            with suppress(OSError):
                place.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        if lock:
            with suppress(OSError):  # The lock file must go while it is locked: the next holder makes a new one.
                place.unlink()
            lock.release()


def _acquired(path: Path, place: Path) -> FileLock | None:
    """Return the lock, or None on a file system without locks."""
    holder = "another process"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, ValueError):  # Read first, because some versions of filelock empty the file.
            holder = place.read_text() or holder
        lock = FileLock(place, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"{path} is in use by {holder}; wait for it to end, or give another path") from None
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise files.refusal(path, error) from None
    return lock
