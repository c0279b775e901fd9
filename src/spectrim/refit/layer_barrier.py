"""Run several forward passes layer by layer: each waits at a layer until all the others have reached it."""

import threading
from collections.abc import Callable, Sequence
from functools import partial

from spectrim.tools.threads import inheriting


class Lockstep:
    """Functions that call ``station`` from within, and ``met(k)`` once all of them have come to their k-th station.

    Each has a thread of its own, which is what lets a forward pass stop in its middle; only one runs at a time. It
    computes as the thread of the caller does (``inheriting``).
    """

    def __init__(self, met: Callable[[int], None]) -> None:
        self._met, self._stations = met, 0
        self._turn, self._errors = threading.Lock(), list[BaseException]()
        self._barrier = threading.Barrier(1)

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """Run them to their ends. The first error of any, or of ``met``, ends all and is raised."""
        if not functions:
            return
        self._barrier = threading.Barrier(len(functions), self._meet)
        threads = [
            threading.Thread(target=inheriting(partial(self._one, function)), daemon=True) for function in functions
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # after Ctrl-C, or where there are no more threads, those that wait are let go
            self._barrier.abort()
            for thread in threads:
                if thread.ident is not None:  # a process that ends while one runs is aborted
                    thread.join()
        if self._errors:
            raise self._errors[0]

    def station(self) -> None:
        """Wait for the others. To be called by the functions alone."""
        self._turn.release()
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise _LetGo from None
        finally:
            self._turn.acquire()

    def _meet(self) -> None:
        try:
            self._met(self._stations)
        except BaseException as error:
            self._errors.append(error)
            raise _LetGo from None
        self._stations += 1

    def _one(self, function: Callable[[], None]) -> None:
        with self._turn:
            if self._barrier.broken:
                return
            try:
                function()
            except _LetGo:
                pass
            except BaseException as error:
                self._errors.append(error)
                self._barrier.abort()


class _LetGo(Exception):
    """Raised where another function has failed; no RuntimeError, which a model's own would be taken for."""
