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

    A process that was started to ignore SIGTERM still ignores it. Interrupts are ``uncovered``.
    """
    usual = signal.getsignal(signal.SIGTERM)
    with uncovered():
        if usual is signal.SIG_IGN or current_thread() is not main_thread():
            yield
            return
        signal.signal(signal.SIGTERM, _raise)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, usual)


@contextmanager
def uncovered() -> Iterator[None]:
    """Raise the interrupt in place of an error that covers it.

    What cleans up after an interrupt may fail in turn, as omegaconf does where a node was half made.
    """
    try:
        yield
    except Exception as error:
        if stop := _interrupt_behind(error):
            raise stop from None
        raise


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    chain: list[BaseException] = [error]
    for one in chain:
        if isinstance(one, KeyboardInterrupt):
            return one
        chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]
    return None


def ending(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return the word for how a command was stopped, and the status with which it exits."""
    return ("terminated", STATUS) if isinstance(stop, Terminated) else ("interrupted", 130)


def _raise(*_: int | FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one must not break what the first one set in motion.
    raise Terminated
