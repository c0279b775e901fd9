"""Stop on SIGTERM, which batch systems such as Slurm send before they kill, as on Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import NoReturn

STATUS = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. What handles Ctrl-C handles it too."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raise ``Terminated`` where SIGTERM arrives while the block runs. Files are written atomically, so all are whole.

    A process that was started to ignore SIGTERM still ignores it.
    """
    usual = signal.getsignal(signal.SIGTERM)
    if usual is signal.SIG_IGN or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def ending(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return the word for how a command was stopped, and the status with which it exits."""
    return ("terminated", STATUS) if isinstance(stop, Terminated) else ("interrupted", 130)


def _raise(*_: int | FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one must not break what the first one set in motion.
    raise Terminated
