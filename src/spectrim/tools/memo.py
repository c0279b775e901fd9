"""What was computed of a model, kept for as long as what it came from stays the same."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class Memory:
    """Results by the model, their kind and a key that names all they depend on; the oldest of a kind gives way.

    ``keep``: how many of each kind are kept, one where nothing is said, 0 for none.
    """

    def __init__(self, **keep: int) -> None:
        self.keep = keep
        self._known: WeakKeyDictionary[nn.Module, dict[str, dict[Hashable, Any]]] = WeakKeyDictionary()

    def get(self, model: nn.Module, kind: str, key: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for a ``key``."""
        size = self.keep.get(kind, 1)
        if not size:
            return make()
        known, name = self._known.setdefault(model, {}).setdefault(kind, {}), key()
        if name not in known:
            while len(known) >= size:  # before the new one is made: both need not fit into memory
                del known[next(iter(known))]
            known[name] = make()
        return known[name]
