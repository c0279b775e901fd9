"""A run is locked while it is computed, so that the same grid started twice computes no cell twice."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from spectrim.cli.messages import LOG
from spectrim.tools import files


class Elsewhere(Exception):
    """Another process computes the run. The message says where, and since when.

    ``result``: the file that the run makes.
    """

    def __init__(self, where: str, result: Path) -> None:
        super().__init__(where)
        self.result = result


@contextmanager
def locked(result: Path, wait: bool) -> Iterator[None]:
    """Lock a run against other processes while the block computes it.

    The lock lies beside ``result``, the file that the run makes. It works between machines where their file system
    has locks. The system releases the lock of a process that is killed.

    ``wait``: whether to wait for another process that computes the run. Else ``Elsewhere`` is raised.
    Raises ``UserError`` where the folder cannot be written.
    """
    lock, note = FileLock(_beside(result, "lock")), _beside(result, "running")
    try:
        result.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise Elsewhere(_where(note), result) from None
            LOG.info("%s is computed %s; waiting for it", result, _where(note))
            lock.acquire()
    except OSError as error:
        raise files.refusal(result, error) from None
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        files.write({note: json.dumps({"machine": platform.node(), "process": os.getpid(), "since": since}).encode()})
        yield
    finally:
        files.discard(note)  # One that stays does no harm: without the lock it says nothing.
        _release(lock)


def running(result: Path) -> str | None:
    """Return where a run is computed, and since when; None where no process computes it."""
    note = _beside(result, "running")
    if not note.exists():
        return None
    lock = FileLock(_beside(result, "lock"))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return _where(note)
    _release(lock)
    return None  # the process that left the note was killed


def wait_for(result: Path) -> None:
    """Wait until no process computes the run."""
    lock = FileLock(_beside(result, "lock"))
    lock.acquire()
    _release(lock)


def _release(lock: BaseFileLock) -> None:
    """Remove the file of a lock while it is held, and release it. A process that waits for it opens a new file."""
    files.discard(Path(lock.lock_file))
    lock.release()


def _beside(result: Path, kind: str) -> Path:
    """Return the path of a hidden file beside ``result``, which no reader of records takes for one."""
    return result.with_name(f".{result.stem}.{kind}")


def _where(note: Path) -> str:
    try:
        told = files.read_json(note)
        return f"by process {told['process']} on {told['machine']} since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        return "by another process"
