"""Time factored layers beside the dense ones, layer by layer, at about the same share of the MACs."""

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
from measure import Outcome, untrained
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD, View
from spectrim.report.table import Column, Table
from spectrim.surgery import find_layers
from spectrim.surgery.cost import model_cost
from spectrim.surgery.latency import milliseconds

MODELS = ("resnet20", "vgg19_half", "resnext20", "densenet22")
MACS_KEPT = 0.5
COLUMNS = (
    Column("model", "model"),
    Column("layer", "layer"),
    Column("shape", "weight"),
    Column("input", "input"),
    Column("stride", "stride", 0),
    Column("groups", "groups", 0),
    Column("alike", "layers alike", 0),
    Column("batch", "batch", 0),
    Column("view", "view"),
    Column("rank", "rank", 0),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("dense_ms", "dense ms", 3),
    Column("factored_ms", "factored ms", 3),
    Column("time_ratio", "time ratio", 2),
    Column("verdict", "factored is"),
)


def benchmark(quick: bool) -> Outcome:
    """Time every kind of layer (weight, stride, groups, input) of four networks, at two batch sizes, in both views."""
    models, batches, rounds = (MODELS[:1], (1, 2), 1) if quick else (MODELS, (1, 128), 3)
    rows = [
        {"model": model, **kind, "batch": batch, **measured}
        for model in models
        for layer, x, kind in _kinds(model, limit=2 if quick else None)
        for batch in batches
        for measured in _measured(layer, x.expand(batch, *x.shape[1:]), rounds)
    ]
    data = pd.DataFrame(rows)
    notes = [
        "No target: this says where factoring does not pay. Slower than dense: " + "; ".join(_summary(data)) + ".",
        f"Rank: the largest that keeps at most {MACS_KEPT:.0%} of the layer's MACs, at least 1. Ratio: median "
        f"over {rounds} rounds in which dense and factored take turns, each time the median of the runs in 20 ms. "
        "float32, weights and inputs in the channels-last layout. A 1×1 convolution is the same in both views and "
        "listed once, as channel.",
    ]
    settings = {
        "quick": quick,
        "models": list(models),
        "batches": list(batches),
        "rounds": rounds,
        "macs_kept": MACS_KEPT,
    }
    caption = f"Latency of factored against dense layers at {MACS_KEPT:.0%} of the MACs"
    return Outcome(
        Table("latency", data, COLUMNS, caption, notes, group="model"), [], settings, "random inputs, seed 0"
    )


def _kinds(model: str, limit: int | None) -> Iterator[tuple[nn.Module, Tensor, dict[str, Any]]]:
    """Yield one layer of each kind, an input of it as a batch of one, and its kind."""
    network = untrained(model)
    image = torch.randn(1, 3, 32, 32)
    layers, _ = find_layers.factorable(network, image)
    seen: dict[tuple, tuple[nn.Module, Tensor, dict[str, Any]]] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        kind = _kind(layer, x)
        seen.setdefault(tuple(kind.values()), (layer, torch.randn_like(x), {"layer": name, **kind, "alike": 0}))
        seen[tuple(kind.values())][2]["alike"] += 1

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    with torch.inference_mode():
        network(image)
    for hook in hooks:
        hook.remove()
    yield from list(seen.values())[:limit]


def _kind(layer: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return the sizes that the time of a layer depends on."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    stride, groups = (layer.stride[0], layer.groups) if isinstance(layer, nn.Conv2d) else (1, 1)
    shape, taken = "×".join(map(str, layer.weight.shape)), "×".join(map(str, x.shape[1:]))
    return {"shape": shape, "input": taken, "stride": stride, "groups": groups}


def _measured(layer: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return one row per view."""
    if isinstance(layer, nn.Conv2d):
        x = x.contiguous(memory_format=torch.channels_last)
    dense_macs = model_cost(layer, x).macs
    factored: dict[str, nn.Module] = {}
    rows: list[dict[str, Any]] = []
    for view in _views(layer):
        spectrum = SVD(view).spectrum(layer)
        rank = max(1, int(MACS_KEPT * dense_macs / model_cost(spectrum.factor(1), x).macs))
        small = spectrum.factor(rank).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        form = spectrum.kept(rank).form.to_text()
        factored[form] = small
        rows.append({"view": form, "rank": rank, "macs_kept": model_cost(small, x).macs / dense_macs})
    times = [
        {"dense": milliseconds(layer, x), **{view: milliseconds(small, x) for view, small in factored.items()}}
        for _ in range(rounds)
    ]
    for row in rows:
        row["dense_ms"] = median(time["dense"] for time in times)
        row["factored_ms"] = median(time[row["view"]] for time in times)
        row["time_ratio"] = median(time[row["view"]] / time["dense"] for time in times)
        row["verdict"] = "SLOWER" if row["time_ratio"] > 1 else "faster"
    return rows


def _views(layer: nn.Module) -> tuple[View, ...]:
    both = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
    return ("channel", "spatial") if both else ("channel",)


def _summary(data: pd.DataFrame) -> list[str]:
    said = []
    for (batch, view), rows in data.groupby(["batch", "view"]):
        said.append(f"batch {batch}, {view}: {int((rows['time_ratio'] > 1).sum())} of {len(rows)}")
    return said
