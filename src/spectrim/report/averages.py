"""Average runs over their seeds."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from spectrim.report.frame import KEYS

NOTE = (
    "Each number is a mean ± standard deviation (ddof = 1) over the runs; a single run has no deviation. The column n "
    "gives training seeds × calibration seeds. In pairs, each training seed has its own calibration draw."
)


def with_dense(frame: pd.DataFrame, values: Sequence[str], words: Sequence[str] = ()) -> pd.DataFrame:
    """Average runs over seeds: one row per model and method, each model's dense row first.

    The columns are those of ``over_seeds``, with ``KEYS``. A dense network does not depend on the calibration draw, so
    its row has one run per training seed. If there are several data sets, ``model`` states the data set too, and
    ``network`` does not. ``words``: further columns that tell methods apart; a dense row has none.
    """
    if frame["data"].nunique() > 1:
        frame = frame.assign(model=frame["model"] + " on " + frame["data"])
    by = ("model", "data", "method", "variant", *words, *KEYS)
    dense = frame.drop_duplicates(["model", "data", "seed"]).assign(mode="", calibration_seed=None)
    dense[["method", "variant", "algorithm"]] = "dense"
    dense[list(words)] = None
    dense[["params_kept", "macs_kept", "layers_kept"]] = 1.0
    for split in ("calibration", "test"):
        for metric in ("loss", "accuracy"):
            dense[f"{split}_{metric}"] = dense[f"dense_{split}_{metric}"]
    absent = [value for value in values if value.startswith(("change_", "predicted", "relative"))]
    dense[absent] = math.nan
    rows = []
    for (model, data), own in frame.groupby(["model", "data"], sort=False):
        rows += over_seeds(dense[(dense["model"] == model) & (dense["data"] == data)], by, values).to_dict(
            orient="records"
        )
        rows += over_seeds(own, by, values).to_dict(orient="records")
    found = pd.DataFrame(rows)
    # Shares kept are 1 by definition for a dense network, so they have no deviation.
    shares = [f"{value}_std" for value in values if value.endswith("_kept")]
    found.loc[found["algorithm"] == "dense", shares] = math.nan
    return found


def over_seeds(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Return the mean and standard deviation of each value over the runs of a group, with ``n``.

    The standard deviation has ddof = 1 and is NaN for a single run. Rows keep the order in which the groups first
    appear. The columns are ``by``, each value and its ``_std``, ``runs`` (number of runs), ``n`` (see ``spelled_n``),
    and ``records`` (see ``records_of``).

    ``frame``: with ``record``, the names of the records that a run is read from.
    """
    rows = []
    for keys, group in frame.groupby(list(by), sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, keys, strict=True))
        for value in values:
            numbers = group[value].astype(float)
            row[value] = float(numbers.mean())
            row[f"{value}_std"] = float(numbers.std(ddof=1)) if numbers.count() > 1 else math.nan
        row |= {"runs": len(group), "n": spelled_n(group), "records": records_of(group["record"])}
        rows.append(row)
    return pd.DataFrame(rows)


def records_of(named: "pd.Series[str]") -> str:
    """Return the names of the records behind a row, EXPERIMENT/SIGNATURE each, with spaces between.

    ``named``: such names, or several of them with spaces between.
    """
    return " ".join(dict.fromkeys(" ".join(named.dropna()).split()))


def seeds_note(rows: pd.DataFrame, by: str = "model") -> str:
    """Return a note that gives the n of the compressed rows of each model, for a table without a column for it."""
    compressed = rows[rows["algorithm"] != "dense"]
    found = {str(name): ", ".join(dict.fromkeys(own["n"])) for name, own in compressed.groupby(by, sort=False)}
    said = "; ".join(f"{name}: {n}" for name, n in found.items()) if len(set(found.values())) > 1 else ""
    return (
        f"Mean ± standard deviation over training seeds × calibration seeds ({said or next(iter(found.values()), '')})."
    )


def spelled_n(group: pd.DataFrame) -> str:
    """Describe the seeds of a group of runs.

    ``3 × 2`` means three training seeds and two calibration seeds; the number of runs follows if it is not their
    product. ``3`` means that the runs use no calibration, as for a dense network. ``3 pairs`` means that each training
    seed has its own calibration draw.
    """
    seeds, draws, total = group["seed"].nunique(), group["calibration_seed"].nunique(), len(group)
    if not draws:
        return str(seeds)
    if seeds == draws == total > 1:
        return f"{total} pairs"
    return f"{seeds} × {draws}" + ("" if total == seeds * draws else f" ({total} runs)")
