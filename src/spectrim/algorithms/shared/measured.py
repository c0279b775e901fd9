"""What a search has measured, kept so that it is not measured again after a kill."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.data.images import ImageSplit
from spectrim.data.text import TextSplit
from spectrim.decomposers.spectrum import Decomposer, content
from spectrim.training import saved_state


class Measured:
    """The measurements of a search in their order, each of ``columns`` numbers.

    A search that depends on its settings and on these numbers alone goes on after a kill by being run again: the ones
    that are known, in ``state``, a safetensors file, are given back without measuring, so that it ends as an unbroken
    one does. ``run`` tells it from another search. Raises ``UserError`` where the file is cut short or of another one.
    """

    def __init__(self, state: str | None, run: Mapping[str, Any], columns: int) -> None:
        self.path, self.run, self.columns = Path(state) if state else None, json.dumps(run, sort_keys=True), columns
        self.rows: list[list[float]] = []
        self.given = 0
        if self.path and self.path.exists():
            self.rows = saved_state.read(self.path, self.run)[0]["measured"].tolist()

    def next(self, measure: Callable[[], Sequence[float]]) -> list[float]:
        """The next measurement: the known one, or else ``measure()``, which is then written down.

        Raises ``UserError`` where it cannot be written; those before it are kept.
        """
        if self.given == len(self.rows):
            self.rows.append([float(value) for value in measure()])
            assert len(self.rows[-1]) == self.columns
            if self.path:
                table = torch.tensor(self.rows, dtype=torch.float64)
                saved_state.write(self.path, {"measured": table}, {"run": self.run})
        self.given += 1
        return self.rows[self.given - 1]


def search_identity(algorithm: Any, bench: Workbench, decomposer: Decomposer) -> dict[str, Any]:
    """Return what tells one search from another: class, settings, decomposer, model and images.

    ``evaluations`` and ``state`` are left out, so that a search may be lengthened and its file may be moved.
    """
    data = bench.objective.given("calibration")
    return {
        "method": type(algorithm).__name__,
        "settings": {key: value for key, value in asdict(algorithm).items() if key not in ("evaluations", "state")},
        "decomposer": repr(decomposer),
        "model": content(bench.model.state_dict().values()),
        "layers": list(bench.spectra),
        "data": data.digest() if isinstance(data, ImageSplit | TextSplit) else None,
    }
