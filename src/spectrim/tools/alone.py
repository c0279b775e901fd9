"""Of all threads of a process, one at a time works on models: it sets what torch keeps for the whole process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

_OWNER: ContextVar[object | None] = ContextVar("owner", default=None)


class _Place:
    """The place that one thread holds at a time."""

    def __init__(self) -> None:
        self.lock, self.owner = Lock(), object()


_PLACE = _Place()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread is inside of such a block. A thread that inherits from this one (``threads``) may be.

    Classes that are watched, random numbers, kernels that are switched off and modules that are counted are those of
    all threads.
    """
    if _OWNER.get() is _PLACE.owner:
        yield
        return
    place = _PLACE
    with place.lock:
        place.owner = object()
        token = _OWNER.set(place.owner)
        try:
            yield
        finally:
            _OWNER.reset(token)
            place.owner = object()


def _in_child() -> None:
    """Give a forked process a free place: of the threads of its parent it has one."""
    global _PLACE
    _PLACE = _Place()


os.register_at_fork(after_in_child=_in_child)
