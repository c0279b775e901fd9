"""Store the measurements of a search, so that a resumed search takes none of them again."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.data.splits import digest_if_known
from spectrim.tools.content import of_state
from spectrim.training import saved_state
from spectrim.training.state_lock import locked


class Measurements:
    """Store the measurements of a search in their order, so that none is taken twice after a kill.

    A search that depends on its settings and on these numbers alone is resumed by running it again. It is given the
    stored numbers first, and ends as an unbroken one does. Each row of the file holds the ranks and the numbers.

    ``state``: path of a safetensors file; None: nothing is stored. ``identity``: what tells this search from another.
    ``read``: counter of the samples that the measurements read, by split. A stored measurement adds what it once read,
    so that a resumed search counts as an unbroken one.
    Raises ``UserError`` where the file is truncated or belongs to another search.
    """

    def __init__(self, state: str | None, identity: Mapping[str, Any], read: Counter[str]) -> None:
        self.path, self.run, self.read = Path(state) if state else None, json.dumps(identity, sort_keys=True), read
        self.rows: list[list[float]] = []
        self.reads: list[dict[str, int]] = []  # of each row
        self.given = 0
        if self.path and self.path.exists():
            tensors, metadata = saved_state.read(self.path, self.run)
            self.rows = tensors["measured"].tolist()
            self.reads = json.loads(metadata.get("reads", "null")) or [{} for _ in self.rows]

    @classmethod
    @contextmanager
    def opened(cls, state: str | None, identity: Mapping[str, Any], read: Counter[str]) -> Iterator["Measurements"]:
        """Lock the file, if there is one, against other processes while the block runs.

        Raises ``UserError`` where another process uses it, and as the class does.
        """
        with locked(Path(state)) if state else nullcontext():
            yield cls(state, identity, read)

    def next(self, ranks: Sequence[int], measure: Callable[[], Sequence[float]]) -> list[float]:
        """Return the numbers measured at ``ranks``: the stored ones, or else those of ``measure()``, which are stored.

        A budget in milliseconds is timed anew after a kill and may lead to other ranks. Stored rows of other ranks are
        dropped, with all that follow. Raises ``UserError`` where the file cannot be written; the rows before are kept.
        """
        if self.rows[self.given : self.given + 1] and self.rows[self.given][: len(ranks)] != list(ranks):
            del self.rows[self.given :], self.reads[self.given :]
        if self.given == len(self.rows):
            before = Counter(self.read)
            self.rows.append([float(value) for value in (*ranks, *measure())])
            self.reads.append(dict(self.read - before))
            if self.path:
                table = torch.tensor(self.rows, dtype=torch.float64)
                metadata = {"run": self.run, "reads": json.dumps(self.reads)}
                saved_state.write(self.path, {"measured": table}, metadata)
        else:
            self.read.update(self.reads[self.given])
        self.given += 1
        return self.rows[self.given - 1][len(ranks) :]


def search_identity(algorithm: Any, bench: Workbench) -> dict[str, Any]:
    """Return what tells one search from another: class, settings, decomposer, model and images.

    ``evaluations`` and ``state`` are left out, so that a search may be lengthened and its file may be moved.
    """
    return {
        "method": type(algorithm).__name__,
        "settings": {key: value for key, value in asdict(algorithm).items() if key not in ("evaluations", "state")},
        "decomposer": repr(bench.decomposer),
        "model": of_state(bench.model),
        "layers": list(bench.spectra),
        "data": digest_if_known(bench.objective.given("calibration")),
    }
