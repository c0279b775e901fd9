"""Find the largest setting that passes, by bisection."""

from collections.abc import Callable
from typing import TypeVar

from spectrim.tools.live import Bar

T = TypeVar("T")


def bisect(at: Callable[[float], T | None], low: float, high: float, steps: int, label: str | None = None) -> T | None:
    """Return what ``at`` gives for the largest setting found that passes; None where none passes.

    ``at``: returns a result for a setting that passes, and None for one that fails.
    ``low``, ``high``: the interval, whose ends are not tried. Settings near ``low`` should pass.
    ``steps``: number of settings tried, each in the middle of the interval that is left.
    ``label``: the name of the progress bar; None shows none.
    """
    best = None
    for _ in Bar(range(steps), label, unit="step", leave=False, disable=None if label else True):
        middle = (low + high) / 2
        found = at(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best
