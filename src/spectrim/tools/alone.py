"""Of all selections in a process, one at a time works on a model."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Condition

_OWNER: ContextVar[object | None] = ContextVar("owner", default=None)
_HELD: dict[int, object] = {}  # the owner of each part of a model, by its id
_FREED = Condition()
os.register_at_fork(after_in_child=_HELD.clear)  # the threads that held them are not there


@contextmanager
def alone_with(parts: Iterable[object]) -> Iterator[None]:
    """Wait until no other thread holds any of ``parts`` of a model, and hold them inside the block.

    A thread that inherits from this one (``threads``) holds what this one holds.
    """
    ids, owner = {id(part) for part in parts}, _OWNER.get() or object()
    with _FREED:
        _FREED.wait_for(lambda: all(_HELD.get(part, owner) is owner for part in ids))
        mine = ids - _HELD.keys()
        _HELD.update(dict.fromkeys(mine, owner))
    token = _OWNER.set(owner)
    try:
        yield
    finally:
        _OWNER.reset(token)
        with _FREED:
            for part in mine:
                _HELD.pop(part, None)
            _FREED.notify_all()
