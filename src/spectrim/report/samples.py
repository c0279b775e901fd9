"""What runs record sample by sample: the paired change of the test loss, and agreement with the dense network."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from spectrim.records.records import Record


def measures(found: Iterable[Record]) -> pd.DataFrame:
    """Return one row per run, by ``signature``; NaN for what it did not record.

    Column ``error``: standard error over the samples of the mean change of the test loss, compressed minus dense.
    Column ``lowered``: number of samples whose loss fell.
    Column ``samples``: number of test samples.
    Column ``divergence``: mean KL divergence from the dense network's predictions on other inputs, in nats.
    Column ``same_answer``: share of these inputs with the answer of the dense network.
    """
    return pd.DataFrame([_row(record) for record in found])


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"signature": record["signature"]}
    losses = record.get("test_losses", {"compressed": [], "dense": []})
    change = pd.Series(losses["compressed"], dtype=float) - pd.Series(losses["dense"], dtype=float)
    row |= {
        "error": float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.nan,
        "lowered": int((change < 0).sum()) if len(change) else math.nan,
        "samples": len(change) or math.nan,
    }
    beside = list(record.get("agreement", {}).values())
    for key in ("divergence", "same_answer"):
        row[key] = sum(one[key] for one in beside) / len(beside) if beside else math.nan
    return row
