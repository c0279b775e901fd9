"""Time pivoted layers beside plain ones of the same rank, and count their parameters and MACs."""

from statistics import median
from typing import Any

import pandas as pd
import torch
from measure import Outcome, Target
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD, View
from spectrim.report.table import Column, Table
from spectrim.surgery.cost import layer_parameters, model_cost
from spectrim.surgery.inference import for_inference
from spectrim.surgery.latency import milliseconds

MOST = 1.1  # times the milliseconds of the plain layer
SHARES = (0.25, 0.5)  # of the full rank
CONVOLUTIONS = ((16, 32), (64, 56), (128, 28), (256, 14), (512, 7))  # channels, side of the image
LINEARS = ((768, 768), (768, 3072), (3072, 768))  # inputs, outputs
COLUMNS = (
    Column("layer", "layer"),
    Column("view", "view"),
    Column("rank", "rank", 0),
    Column("batch", "batch", 0),
    Column("params_ratio", "params, pivoted / plain", 2),
    Column("macs_ratio", "MACs, pivoted / plain", 2),
    Column("plain_ms", "plain ms", 3),
    Column("pivoted_ms", "pivoted ms", 3),
    Column("time_ratio", "time, pivoted / plain", 2),
    Column("inference_ms", "for inference ms", 3),
    Column("inference_ratio", "time, for inference / plain", 2),
)


def benchmark(quick: bool) -> Outcome:
    """Time convolutions of 3 x 3 in both views and linear layers at two ranks and two batch sizes."""
    batches, rounds = ((1, 2), 1) if quick else ((1, 128), 3)
    cases = _cases()[:: 4 if quick else 1]
    rows = [
        _measured(name, layer, x.expand(batch, *x.shape[1:]), view, share, rounds)
        for name, layer, x, view in cases
        for share in SHARES[: 1 if quick else None]
        for batch in batches
    ]
    data = pd.DataFrame(rows)
    targets = [
        Target(
            f"largest ratio of {key.replace('_', ' ')} at batch {batch}", float(own[key].max()), MOST, at_least=False
        )
        for key in ("time_ratio", "inference_ratio")
        for batch, own in data.groupby("batch")
    ]
    slow, slow_copies = (int((data[key] > MOST).sum()) for key in ("time_ratio", "inference_ratio"))
    notes = [
        *(target.line() for target in targets),
        f"Slower by more than a tenth: {slow} of {len(data)} rows, and {slow_copies} for inference. A budget in "
        "milliseconds times the layers, and does not choose them.",
        "For inference: the copy that spectrim.for_inference makes. It puts each kernel together once, and is dense "
        "where that has fewer numbers than plain factors.",
        "Plain and pivoted layers of one rank compute the same. A pivoted convolution puts its kernel together in each "
        "pass: it stores less, and multiplies as often.",
        f"Ratio: median over {rounds} rounds in which all take turns, each time the median of the runs in 20 ms. "
        "float32, convolutions in the channels-last layout.",
    ]
    settings = {"quick": quick, "batches": list(batches), "rounds": rounds, "shares": list(SHARES)}
    caption = "Pivoted against plain factors of the same rank"
    return Outcome(Table("pivoted", data, COLUMNS, caption, notes), targets, settings, "random weights, seed 0")


def _cases() -> list[tuple[str, nn.Module, Tensor, View]]:
    torch.manual_seed(0)
    found: list[tuple[str, nn.Module, Tensor, View]] = []
    for channels, side in CONVOLUTIONS:
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        views: tuple[View, ...] = ("channel", "spatial")
        found += [
            (f"{channels}×{channels}×3×3 on {side}²", layer, torch.randn(1, channels, side, side), v) for v in views
        ]
    return found + [(f"{i} → {o}", nn.Linear(i, o), torch.randn(1, i), "channel") for i, o in LINEARS]


def _measured(name: str, layer: nn.Module, x: Tensor, view: View, share: float, rounds: int) -> dict[str, Any]:
    """Return one row of the table."""
    if isinstance(layer, nn.Conv2d):
        x = x.contiguous(memory_format=torch.channels_last)
    spectra = [SVD(view, "float32", factors=own).spectrum(layer) for own in ("plain", "pivoted")]
    rank = max(1, int(share * spectra[0].max_rank))
    plain, pivoted = (spectrum.factor(rank).to(memory_format=torch.channels_last) for spectrum in spectra)  # type: ignore[call-overload]
    copied = for_inference(pivoted)
    times = [[milliseconds(own, x) for own in (plain, pivoted, copied)] for _ in range(rounds)]
    params = [layer_parameters(nn.Sequential(own), "0") for own in (plain, pivoted)]
    macs = [model_cost(own, x).macs for own in (plain, pivoted)]
    return {
        "layer": name,
        "view": "linear" if isinstance(layer, nn.Linear) else view,
        "rank": rank,
        "batch": len(x),
        "params_ratio": params[1] / params[0],
        "macs_ratio": macs[1] / macs[0],
        "plain_ms": median(own[0] for own in times),
        "pivoted_ms": median(own[1] for own in times),
        "time_ratio": median(own[1] / own[0] for own in times),
        "inference_ms": median(own[2] for own in times),
        "inference_ratio": median(own[2] / own[0] for own in times),
    }
