"""Results that are kept from one selection to the next, without an effect on what each selection is said to read."""

import math
from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache
from typing import TypeVar

from torch import nn

from spectrim.tools.memo import Memory
from spectrim.tools.precision import settings_of_numbers

T = TypeVar("T")

# Kinds of single measurements, of which a search keeps all because they are a few numbers each.
MEASUREMENTS = {"thresholds": math.inf, "aimet": math.inf}


class Remembered:
    """A cache of results that counts the samples read as if each selection started with an empty cache.

    ``memory``: the cache.
    ``read``: counter of the samples read, by split, which is corrected in place.
    """

    def __init__(self, memory: Memory, read: Counter[str]) -> None:
        self.memory, self.read = memory, read
        self._cold = Memory(**memory.keep)

    def start_selection(self) -> None:
        """Count from zero, as if nothing were remembered. The results are kept."""
        self.read.clear()
        self._cold = Memory(**self.memory.keep)

    def get(self, model: nn.Module, kind: str, key: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """Return the cached result for ``key()``, or call ``make`` and cache its result (``Memory.get``).

        The samples that ``make`` read are counted where this selection, alone, would have had to call it.
        """
        before, name, first = Counter(self.read), cache(lambda: (key(), *settings_of_numbers())), []

        def counted() -> tuple[T, Counter[str]]:
            return make(), self.read - before

        result, cost = self.memory.get(model, kind, name, counted)
        # A second memory with the same limits holds what an empty one would hold by now.
        self._cold.get(model, kind, name, lambda: first.append(True))
        self.read.clear()
        self.read.update(before + cost if first else before)
        return result
