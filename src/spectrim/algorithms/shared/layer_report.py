"""Make the report of a compressed model, one row a layer, when it is first read."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pandas as pd
import torch

from spectrim.statistics.objective import Objective
from spectrim.tools.precision import exact, uncached
from spectrim.tools.profiling import Timed


class LayerReport(NamedTuple):
    """Hold the report, and what it took.

    ``layers``: one row for each layer that could be factored.
    ``unpredicted``: why the column predicted_change is NaN; empty where it is not.
    ``spent``: seconds, cpu_seconds, and samples_read by split.
    """

    layers: pd.DataFrame
    unpredicted: str
    spent: dict[str, Any]


Reporter = Callable[[], LayerReport]


def reporter(make: Callable[[], tuple[pd.DataFrame, str]], objective: Objective) -> Reporter:
    """Return a function that makes the report at its first call, and returns the same one from then on.

    ``make``: returns ``layers`` and ``unpredicted``. It may take a gradient, which no selection needs.
    """

    @cache
    def report() -> LayerReport:
        before = Counter(objective.read)
        with torch.inference_mode(False), uncached(), exact(), Timed() as spent:  # wherever the report is read
            layers, unpredicted = make()
        read = dict(objective.read - before)
        return LayerReport(
            layers, unpredicted, {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds, "samples_read": read}
        )

    return report
