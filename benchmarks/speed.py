"""Time networks cut to a budget of milliseconds: predicted and measured, eager and compiled, beside dense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from measure import Outcome, Target, composed
from torch import nn
from tqdm import tqdm

from spectrim.algorithms.joint import Joint
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.report.table import Column, Table
from spectrim.runs import configuration, task
from spectrim.runs.task import Task
from spectrim.surgery import latency
from spectrim.tools import digests, malloc

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("resnet20", "vgg19_half")
DECOMPOSER = WhitenedSVD("spatial")
BATCHES = (1, 128)
SHARES = (0.9, 0.75, 0.6)
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch", 0),
    Column("dense_ms", "dense ms", 2),
    Column("asked", "asked for, % of dense ms", 0, scale=100),
    Column("predicted", "predicted %", 1, scale=100),
    Column("eager", "measured %", 1, scale=100),
    Column("compiled", "compiled, % of dense compiled", 1, scale=100),
    Column("dense_compiled", "dense compiled, % of dense ms", 1, scale=100),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("accuracy_change", "Δ top-1 pp", 2, scale=100, signed=True),
    Column("verdict", "verdict"),
)


def benchmark(quick: bool) -> Outcome:
    """Time joint selection with a budget of time, at two batch sizes, on trained networks for CIFAR-10."""
    models, batches, shares = (("resnet20",), (2,), (0.9,)) if quick else (MODELS, BATCHES, SHARES)
    rows: list[dict[str, Any]] = []
    digests = []
    malloc.keep()  # as the command line does
    with tqdm(desc="speed", total=len(models) * len(batches) * len(shares), leave=False, disable=None) as bar:
        for model in models:
            judged = _trained(model, "digits" if quick else "cifar10")
            digests.append(judged.data_digest)
            for batch in batches:
                dense, times = _compiled(judged.model, quick), _times(judged, batch)
                with patch.object(latency, "measured", return_value=times):  # once, for all budgets
                    for share in shares:
                        row = _cut(judged, dense, batch, share * times.total, quick)
                        rows.append({"model": model, "batch": batch, "dense_ms": times.total, "asked": share, **row})
                        bar.update()
    data = pd.DataFrame(rows, columns=[column.key for column in COLUMNS])
    targets = [_slowest(data, "eager", "eager"), _slowest(data, "compiled", "compiled")]
    notes = [
        *(target.line() for target in targets),
        "Joint selection with milliseconds=, whitened SVD in the spatial view, by a table of what this machine takes "
        "for each layer, eager, made once a network and batch; dense ms: of that table. Measured: the median of "
        f"{latency.TURNS} turns of the models, each the median of enough passes; predicted: the sum of the layers. "
        "Δ top-1: on the test split, no fine-tuning. Out of reach: with rank 1 in every layer where that gains, more "
        "would remain. float32, channels last.",
    ]
    settings = {"quick": quick, "models": list(models), "batches": list(batches), "shares": list(shares)}
    table = Table("speed", data, COLUMNS, "Networks cut to a budget of milliseconds", notes, group="model")
    return Outcome(table, targets, settings, ", ".join(dict.fromkeys(digests)))


def _trained(model: str, data: str) -> Task:
    """Return the network of a committed checkpoint with its splits, as a run has it."""
    cfg = composed(f"model={model}", f"data={data}")
    path = ROOT / f"results/checkpoints/{model}-{data}-seed0.safetensors"
    weights = path, digests.of_file(path)
    return task.load(configuration.plain(cfg.model), 0, weights, configuration.plain(cfg.data), {}, torch.device("cpu"))


def _compiled(model: nn.Module, quick: bool) -> Any:
    return model if quick else torch.compile(model)


def _times(judged: Task, batch: int) -> latency.Times:
    bench = Workbench.of(judged.model, DECOMPOSER, judged.objective)
    return latency.measured(bench.model, bench.spectra, bench.example, batch)


def _cut(judged: Task, dense: Any, batch: int, milliseconds: float, quick: bool) -> dict[str, Any]:
    """Return the row of one budget. ``dense``: the dense model, compiled."""
    try:
        chosen = Joint(milliseconds=milliseconds, batch_size=batch)
        compressed = chosen.compress(judged.model, DECOMPOSER, judged.objective)
    except UserError as error:
        return {"verdict": str(error)}
    if not compressed.plan:
        return {"verdict": "left dense: no faster as a whole"}
    models = [judged.model, compressed.model, dense, _compiled(compressed.model, quick)]
    return _beside(judged, compressed, latency.in_turns(models, judged.objective.example(), batch))


def _beside(judged: Task, compressed: Compressed, times: Sequence[float]) -> dict[str, Any]:
    dense_ms, eager_ms, dense_compiled_ms, compiled_ms = times
    outcome = judged.outcome(compressed)
    change = outcome["compressed"]["test"]["accuracy"] - outcome["dense"]["test"]["accuracy"]
    return {
        "predicted": compressed.log[-1]["share"],
        "eager": eager_ms / dense_ms,
        "compiled": compiled_ms / dense_compiled_ms,
        "dense_compiled": dense_compiled_ms / dense_ms,
        "params_kept": compressed.params_kept,
        "macs_kept": compressed.macs_kept,
        "accuracy_change": change,
        "verdict": "faster",
    }


def _slowest(data: pd.DataFrame, column: str, called: str) -> Target:
    slowest = float(data[column].astype(float).fillna(1.0).max())  # where nothing was cut, the dense one itself
    return Target(f"the slowest network returned over the dense one, {called}", slowest, 1, at_least=False)
