"""Measure how the loss changes with the rank of a weight that an embedding shares with a head."""

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.work import Outlook
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.statistics.objective import Objective
from spectrim.surgery.tied import tied_layers
from spectrim.tools.content import of_state
from spectrim.tools.live import Bar

SAMPLES = 16  # verification samples of each measurement; all read the same ones
PARTS = 8  # equal parts of the full rank, at whose ends the loss is measured
LEAST = 1e-9  # what a component adds at least, so that it stays while there is room, and a higher one longer
LEFT = "how the loss depends on its rank is measured on other texts: give verification="


def leaving_unmeasured(model: nn.Module, objective: Objective) -> Objective:
    """Return ``objective`` with the tied weights of ``model`` left dense where no verification samples are given."""
    if "verification" in objective.splits:
        return objective
    return objective.leaving(dict.fromkeys(tied_layers(model), LEFT))


def measured_changes(bench: Workbench) -> dict[str, Tensor]:
    """Return, for each tied weight, the change of the loss by each component, shape (R,), float64.

    The calibration texts tell little of such a weight. Its rows that are factored are those of ids which hardly occur
    there, and others will come in other texts. And a softmax feels the errors of scores exponentially: those of some
    ten thousand rare ids, each a little wrong, together take the probability from the others. So the loss is measured
    on verification samples, with this weight alone cut at some ranks. Between them the curve is the lower convex hull,
    which is never below zero: so few samples tell no gain. Components go in their order, the last one first.
    """
    names = [name for name in tied_layers(bench.model) if name in bench.spectra]
    if not names:
        return {}
    rises = bench.objective.remembered(
        bench.model,
        "thresholds",
        lambda: ("tied", tuple(names), bench.decomposer, of_state(bench.model)),
        lambda: {name: _rises(bench, name) for name in Bar(names, "measure", unit="embedding", leave=False)},
    )
    return {name: _by_component(rises[name], bench.spectra[name].max_rank) for name in names}


def samples_measured(outlook: Outlook) -> int:
    """Return the number of samples that ``measured_changes`` reads: at each rank, and at the dense model."""
    return outlook.ties * (PARTS + 1) * min(SAMPLES, outlook.samples.get("verification", 0))


def _rises(bench: Workbench, name: str) -> dict[int, float]:
    """Return the rise of the loss by rank, with all other layers as they are."""
    seen, full = bench.objective.held("verification", SAMPLES), bench.spectra[name].max_rank
    ranks = sorted({1, *(max(1, full * part // PARTS) for part in range(1, PARTS))} - {full})
    dense = seen.evaluate(bench.trial({}), "verification").loss
    return {rank: seen.evaluate(bench.trial({name: rank}), "verification").loss - dense for rank in ranks}


def _by_component(rises: dict[int, float], full: int) -> Tensor:
    """Return what each component adds to the curve, from the highest to the lowest."""
    hull = list[tuple[int, float]]()
    for point in [*((rank, max(rise, 0.0)) for rank, rise in rises.items()), (full, 0.0)]:
        while len(hull) > 1 and _bends_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    ranks, changes = zip(*hull, strict=True)
    falls = -np.diff(np.interp(np.arange(full + 1), ranks, changes))
    falls[0] = falls.max()  # rank 0 is not measured: every layer keeps a component
    return torch.from_numpy(falls + LEAST * (1 + np.arange(full, 0, -1) / full))


def _bends_down(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    """Return whether ``middle`` does not lie below the line from ``first`` to ``last``."""
    (k, a), (m, b), (n, c) = first, middle, last
    return (b - a) * (n - k) >= (c - a) * (m - k)
