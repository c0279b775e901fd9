"""Cache results that are computed from a model, as long as everything they depend on is unchanged."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class Memory:
    """A cache of results by model, kind, and a key that covers all they depend on. It evicts the oldest of a kind.

    ``keep``: number of results to keep by kind (default 1; 0 disables the cache, ``math.inf`` keeps all).
    """

    def __init__(self, **keep: float) -> None:
        self.keep = keep
        self._known: WeakKeyDictionary[nn.Module, dict[str, dict[Hashable, Any]]] = WeakKeyDictionary()

    def get(self, model: nn.Module, kind: str, key: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """Return the cached result for ``key()``, or call ``make`` and cache its result."""
        size = self.keep.get(kind, 1)
        if not size:
            return make()
        known, name = self._known.setdefault(model, {}).setdefault(kind, {}), key()
        if name not in known:
            while len(known) >= size:  # Evict before ``make`` runs, because both may not fit into memory.
                del known[next(iter(known))]
            known[name] = make()
        return known[name]
