"""Tell whether compressed models stay within a rise of the loss on the verification split."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.statistics import paired_loss

CAUTION = 2.0  # standard errors above the mean: a search tries several models, and one of them may pass by chance
T = TypeVar("T")


def verifier(
    bench: Workbench, increase: float, cut: Callable[[T], nn.Module], log: list[dict[str, Any]]
) -> Callable[[float, T | None], bool]:
    """Return a function that tells whether a point of a search passes, and adds an entry to ``log``. None fails.

    A point passes where the mean rise of the loss and ``CAUTION`` standard errors of it stay within ``increase``.

    ``cut``: makes the model of a point.
    """
    dense = paired_loss.losses(bench.objective, bench.model, "verification")

    def passes(share: float, point: T | None) -> bool:
        said, passed = {}, False
        if point is not None:
            after = paired_loss.losses(bench.objective, cut(point), "verification", dense.by_batch)
            change = paired_loss.change(dense, after)
            said = {"verified_change": change.mean, "standard_error": change.error}
            passed = change.mean + CAUTION * change.error <= increase
        log.append({"share": share, **said, "passed": passed})
        return passed

    return passes
