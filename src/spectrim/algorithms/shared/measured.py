"""Measurements of a search, stored so that a resumed search takes none of them again."""

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
from spectrim.tools import safetensors_stream
from spectrim.training import saved_state


class Measurements:
    """Store the measurements of a search in their order, so that none is taken twice after a kill.

    A search that depends on its settings and on these numbers alone is resumed by running it again. It is given the
    stored numbers first, and ends as an unbroken one does. Each row of the file holds the ranks and the numbers.

    ``state``: path of a safetensors file; None: nothing is stored. ``identity``: what tells this search from another.
    Raises ``UserError`` where the file is cut short or belongs to another search.
    """

    def __init__(self, state: str | None, identity: Mapping[str, Any]) -> None:
        self.path, self.run = Path(state) if state else None, json.dumps(identity, sort_keys=True)
        self.rows: list[list[float]] = []
        self.given = 0
        if self.path and self.path.exists():
            self.rows = saved_state.read(self.path, self.run)[0]["measured"].tolist()

    def next(self, ranks: Sequence[int], measure: Callable[[], Sequence[float]]) -> list[float]:
        """Return the numbers measured at ``ranks``: the stored ones, or else those of ``measure()``, which are stored.

        A budget in milliseconds is timed anew after a kill and may lead to other ranks. Stored rows of other ranks are
        dropped, with all that follow. Raises ``UserError`` where the file cannot be written; the rows before are kept.
        """
        if self.rows[self.given : self.given + 1] and self.rows[self.given][: len(ranks)] != list(ranks):
            del self.rows[self.given :]
        if self.given == len(self.rows):
            self.rows.append([float(value) for value in (*ranks, *measure())])
            if self.path:
                table = torch.tensor(self.rows, dtype=torch.float64)
                safetensors_stream.save(self.path, {"measured": table}, {"run": self.run})
        self.given += 1
        return self.rows[self.given - 1][len(ranks) :]


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
