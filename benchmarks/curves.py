"""Time the curves of error and first-order change over all ranks: one pass, or a new start at each rank."""

import time
from statistics import mean, median
from typing import Any

import pandas as pd
import torch
from measure import Outcome, Target, seconds
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD
from spectrim.factored import linalg
from spectrim.report.table import Column, Table

COLUMNS = (
    Column("way", "way"),
    Column("ranks_timed", "ranks timed", 0),
    Column("seconds_a_rank", "s a rank", 4),
    Column("seconds", "s for all ranks", 2),
    Column("times", "times one pass", 1),
    Column("largest_difference", "largest relative difference"),
)


def benchmark(quick: bool) -> Outcome:
    """Time the curves of a 3x3 convolution with 512 channels: a 512 x 4608 matrix in float64, in the channel view."""
    channels, sampled, repeats = (32, 4, 3) if quick else (512, 8, 3)
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, bias=False)
    gradient = torch.randn_like(layer.weight)
    W, G = layer.weight.detach().double().flatten(1), gradient.double().flatten(1)
    one_pass = median(seconds(lambda: _one_pass(layer, gradient)) for _ in range(repeats))

    error, change = _one_pass(layer, gradient)
    ranks = sorted({round(rank) for rank in torch.linspace(1, channels, sampled).tolist()})
    factors = linalg.svd(W)
    ways = {
        "decomposed anew at each rank": lambda rank: _at_rank(linalg.svd(W), W, G, rank),
        "decomposed once, subtracted at each rank": lambda rank: _at_rank(factors, W, G, rank),
    }
    rows = [_row("one pass", channels, None, one_pass, one_pass, 0.0)]
    for way, work in ways.items():
        times, found = [], []
        for rank in ranks:
            started = time.perf_counter()
            found.append(work(rank))
            times.append(time.perf_counter() - started)
        wanted = torch.stack([error[ranks], change[ranks]], 1)
        off = (torch.tensor(found, dtype=torch.float64) - wanted).abs().amax(0) / wanted.abs().amax(0)
        # The product's time grows linearly with the rank, so the mean over an even spread is that over all ranks.
        rows.append(_row(way, len(ranks), mean(times), channels * mean(times), one_pass, float(off.max())))
    shape = f"{W.shape[0]}×{W.shape[1]}"
    claim = f"one pass over all {channels} ranks of {shape}, faster than decomposing anew by"
    target = Target(claim, rows[1]["times"], 50, at_least=True, digits=0)
    notes = [
        target.line(),
        f"One pass: median of {repeats}, its decomposition included. The other ways: mean of {len(ranks)} evenly "
        f"spread ranks ({', '.join(map(str, ranks))}) times {channels}: extrapolated, the other ranks were not run. "
        "The difference is that of either curve from the one pass, over the largest value of the curve.",
    ]
    settings = {"quick": quick, "matrix": list(W.shape), "repeats": repeats, "ranks_timed": ranks}
    caption = f"Error and first-order change of every rank of a {shape} matrix"
    return Outcome(
        Table("curves", pd.DataFrame(rows), COLUMNS, caption, notes), [target], settings, "random matrix, seed 0"
    )


def _one_pass(layer: nn.Conv2d, gradient: Tensor) -> tuple[Tensor, Tensor]:
    spectrum = SVD().spectrum(layer)  # not spectrum_of, which would remember it
    return spectrum.error(), spectrum.first_order(gradient)


def _at_rank(factors: linalg.SVD, W: Tensor, G: Tensor, rank: int) -> tuple[float, float]:
    U, S, Vh = factors
    difference = (U[:, :rank] * S[:rank]) @ Vh[:rank] - W
    return float(difference.norm()), float((G * difference).sum())


def _row(
    way: str, ranks_timed: int, seconds_a_rank: float | None, total: float, one_pass: float, difference: float
) -> dict[str, Any]:
    return {
        "way": way,
        "ranks_timed": ranks_timed,
        "seconds_a_rank": seconds_a_rank,
        "seconds": total,
        "times": total / one_pass,
        "largest_difference": f"{difference:.1e}",
    }
