"""Faults that a trial meets: a signal or an error of the file system, at a chosen call or a random moment.

A trial runs in a forked process. An audit hook of Python sees each call that changes the file system below the folder
of the trial. At the chosen one it kills the process or raises the error, before anything happens on the disk.
"""

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import UserError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
HANGS_AFTER = 300.0  # seconds, or so many times those of an unbroken run: the machine may be busy
TIMES_UNBROKEN = 30

DONE, REFUSED, BROKE = 0, 3, 4  # how a trial ends by itself
FAILED = (1, 2)  # status of a command that says why
CALLS = "\0calls "


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    ``signal`` is sent, or ``error`` raised, at call number ``at`` that changes the file system (from 0). Without
    ``at``, the signal comes ``after`` so many seconds. ``worker``: it goes to a worker of joblib, once there is one.
    ``largest``: no file may grow beyond so many bytes.
    """

    at: int | None = None
    signal: int = 0
    error: int = 0
    after: float = 0.0
    worker: bool = False
    largest: int | None = None

    @property
    def kind(self) -> str:
        """Return the name under which the table counts it."""
        if self.largest is not None:
            return "file size limit"
        if self.error:
            return f"{errno.errorcode[self.error]} at a call"
        where = "at a call" if self.at is not None else "at a random moment"
        whom = " to a worker" if self.worker else ""
        return f"{signal.Signals(self.signal).name}{whom} {where}" if self.signal else "none"


NONE = Fault()


@dataclass(frozen=True)
class Ending:
    """How a trial ended: ``code`` of the process (negative: the signal), ``calls`` that changed files, what it said,
    and whether it was killed because it hung."""

    code: int
    calls: int
    message: str
    hung: bool = False

    def fits(self, fault: Fault) -> str | None:
        """Return what is wrong with this end under ``fault``; None if nothing is."""
        if self.code == DONE:
            return None
        if self.hung:
            return "it hangs"
        if self.code == BROKE or "Traceback" in self.message:
            return self.message
        if fault.signal and not fault.worker and self.code in (-fault.signal, 128 + fault.signal):
            return None
        said = self.message.strip()
        return None if said and self.code in (REFUSED, *FAILED) else f"status {self.code}, said: {said!r}"


class Trial:
    """A forked process that runs ``work(folder)`` and meets ``fault``. After ``patience`` seconds it is killed."""

    def __init__(self, work: Callable[[Path], Any], folder: Path, fault: Fault, patience: float = HANGS_AFTER) -> None:
        self.fault, self.patience, self.started = fault, patience, time.monotonic()
        self.read, write = os.pipe()  # what the process says; a full disk does not silence it
        os.set_blocking(self.read, False)
        sys.stdout.flush()
        sys.stderr.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none may come before the work has begun
        self.pid = os.fork()
        if not self.pid:
            _child(work, folder, fault, write, blocked)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(write)

    def end(self) -> Ending:
        """Wait for the process; send the signal of the fault when its time has come, and kill what hangs."""
        sent, hung = self.fault.at is not None or not self.fault.signal, False
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            seconds = time.monotonic() - self.started
            if not sent and seconds >= self.fault.after:
                sent = self._send()
            if seconds > self.patience:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        if not self._workers_end():
            return Ending(BROKE, 0, "its workers outlive it")
        with os.fdopen(self.read, "rb") as pipe:
            said = (pipe.read() or b"").decode(errors="replace")
        message, _, calls = said.partition(CALLS)
        return Ending(os.waitstatus_to_exitcode(status), int(calls) if calls.isdigit() else 0, message, hung)

    def _send(self) -> bool:
        """Send the signal of the fault. Return False where it is for a worker and there is none."""
        whom = _workers(self.pid) if self.fault.worker else [self.pid]
        with suppress(ProcessLookupError):  # It has just ended.
            for pid in whom[-1:]:
                os.kill(pid, self.fault.signal)
        return bool(whom)

    def _workers_end(self) -> bool:
        """Wait for the processes that it started, which must end with it, and kill what stays."""
        last = time.monotonic() + self.patience
        while time.monotonic() < last:
            try:
                os.killpg(self.pid, 0)  # sends nothing
            except ProcessLookupError:
                return True
            time.sleep(0.02)
        os.killpg(self.pid, signal.SIGKILL)
        return False


def _workers(group: int) -> list[int]:
    """Return the numbers of joblib's workers in a group of processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            own = os.getpgid(int(folder.name)) == group
            if own and b"popen_loky" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def run(work: Callable[[Path], Any], folder: Path, fault: Fault = NONE, patience: float = HANGS_AFTER) -> Ending:
    """Run ``work(folder)`` in a forked process that meets ``fault``, and return how it ended."""
    return Trial(work, folder, fault, patience).end()


def _child(work: Callable[[Path], Any], folder: Path, fault: Fault, told: int, blocked: set[signal.Signals]) -> None:
    """Run in the forked process, which never returns."""
    os.setpgid(0, 0)  # a group with what it starts
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(silence, stream)
    os.dup2(told, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.set_blocking(told, False)  # what does not fit into the pipe is lost, and nobody waits
    watch, code = _Watch(folder, fault), DONE
    try:
        if fault.largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest, fault.largest))
        sys.addaudithook(watch)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        work(folder)
    except UserError as error:
        code = REFUSED
        print(error, file=sys.stderr)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else REFUSED if end.code else DONE
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        code = BROKE
        traceback.print_exc()
    finally:
        watch.over = True
        sys.stderr.flush()
        os.write(told, f"{CALLS}{watch.calls}".encode())
        os._exit(code)


class _Watch:
    """The audit hook: counts the calls that change files below ``folder``, and lets ``fault`` happen at its own."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault = str(folder), fault
        self.calls, self.over = 0, False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.over or not self._changes(event, args):
            return
        self.calls += 1
        if self.fault.at != self.calls - 1:
            return
        if self.fault.signal:
            os.kill(os.getpid(), self.fault.signal)
        elif self.fault.error:
            raise OSError(self.fault.error, os.strerror(self.fault.error), os.fsdecode(args[0]))

    def _changes(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = args
            return isinstance(path, str) and path.startswith(self.folder) and bool(flags & WRITING)
        return event in CHANGES and os.fspath(args[0]).startswith(self.folder)
