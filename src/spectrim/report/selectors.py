"""Convert records of rank selectors to one row per selector, size and training length, for Table 1 and Figure 6."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.records import Record
from spectrim.report import averages, command, frame, trainings
from spectrim.report.command import Options

BUDGETS = (0.7, 0.5, 0.3)  # shares of the parameters kept
NEAR = 0.05  # share of the parameters: a size this close to a budget represents it
LISTED = ("selector", "approach", "layers", "strategy", "timing", "note")
BY = ("model", "data", "selector", "scratch", "asked", "budget", "epochs")
VALUES = ("params_kept", "test_accuracy", "test_loss", "seconds", "cpu_seconds", "read", "passes")


def listed(path: Path) -> pd.DataFrame:
    """Read the list of selectors, in the order of the table.

    The columns are the class name in lower case, the printed name, the three labels of the source, and a footnote.
    ``frame.PIVOTED`` follows the class name where the layers hold pivoted factors. Labels and footnote may be empty.
    Raises ``UserError`` where the file or a column is missing.
    """
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list of selectors {path}: {error}") from error
    missing = [column for column in LISTED if column not in found]
    if missing:
        raise UserError(f"{path} lacks the column {', '.join(missing)}")
    return found


def runs(options: Options, found: Sequence[Record], selectors: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run of a listed selector, in the order of the table.

    Raises ``UserError`` where no record belongs to a listed selector.
    """
    order = {name: place for place, name in enumerate(selectors["selector"])}
    known = frame.runs(found).set_index("signature")
    both = [(one, known.loc[one["signature"]]) for one in found]
    own = pd.DataFrame([_run(one, run) for one, run in both if _name(one, run) in order])
    if own.empty:
        raise command.lacking(options, "a selector of this table")
    own["place"] = own["selector"].map(order)
    own["size"] = -own["params_kept"]
    return own.sort_values(["model", "data", "place", "scratch", "epochs", "size", "asked"], kind="stable")


def rows(runs: pd.DataFrame, selectors: pd.DataFrame) -> pd.DataFrame:
    """Return one row per network, selector, requested size and number of training epochs, averaged over seeds.

    Zero epochs means truncation without training. The columns are ``BY``, each of ``VALUES`` and its ``_std``,
    ``runs``, ``n``, ``approach``, and these two:

    Column ``at``: the budget that the row represents; NaN if none is close.
    Column ``dense_accuracy``: mean over the trained dense networks of the same seeds, with its ``_std``.

    Raises ``UserError`` where one row would mix several settings.
    """
    for (model, data, name, scratch, asked, _, epochs), own in runs.groupby(list(BY), dropna=False):
        if own["setting"].nunique() > 1:
            what = f"{own['setting'].nunique()} settings of {name} at {asked}, {epochs} epochs, on {model}, {data}"
            start = " from scratch" if scratch else ""
            raise UserError(f"the records hold {what}{start}: they share one row; delete the older records")
    together = averages.over_seeds(runs, BY, VALUES)
    together["approach"] = together["selector"].map(selectors.set_index("selector")["approach"])
    together.loc[together["scratch"], "approach"] += ", from scratch"
    together["at"] = _stands_for(together)
    return together.merge(_dense(runs), "left", ["model", "data"])


def pivoted(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows have pivoted factors."""
    return rows["selector"].str.endswith(frame.PIVOTED)


def _name(record: Record, run: Any) -> str:
    """Return the name in the list of selectors; for fine-tuning, that of the selector it follows."""
    chosen = record["config"]["algorithm"]
    return records.class_of(chosen.get("selector", chosen)) + frame.PIVOTED * (run["factors"] == "pivoted")


def _run(record: Record, run: Any) -> dict[str, Any]:
    chosen = record["config"]["algorithm"]
    selector = chosen.get("selector", chosen)
    scratch = trainings.from_scratch(record)
    budget = selector.get("params_kept")
    read = trainings.samples_read(record)
    return {
        "record": records.name_of(record),
        "model": trainings.net(record),
        "data": record["names"]["data"],
        "selector": _name(record, run),
        "scratch": scratch,
        "asked": _requested(record, selector),
        "budget": math.nan if budget is None else float(budget),
        "epochs": chosen.get("recipe", {}).get("epochs", 0),
        "setting": records.signature({key: value for key, value in run["settings"].items() if not _is_seed(key)}),
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
        "params_kept": run["params_kept"],
        "test_accuracy": run["test_accuracy"],
        "test_loss": run["test_loss"],
        # A run from scratch starts from an untrained dense network, whose accuracy means nothing.
        "dense_accuracy": math.nan if scratch else run["dense_test_accuracy"],
        "seconds": trainings.seconds(record),
        "cpu_seconds": trainings.seconds(record, "cpu_seconds"),
        "read": read,
        "passes": read / record["config"]["data"]["calibration_size"],
    }


def _is_seed(key: str) -> bool:
    return key in frame.SEEDS or key.endswith(".seed")


def _requested(record: Record, selector: Mapping[str, Any]) -> str:
    """Return the requested size, or the setting that determines it, in words."""
    if selector.get("params_kept") is not None:
        return f"{100 * selector['params_kept']:g} %"
    if trainings.is_training(record):
        return ", ".join(trainings.way(record))
    return frame.mode(selector) or "its own choice"


def _stands_for(together: pd.DataFrame) -> list[float]:
    """Return the budget that each row represents, or NaN.

    It is the requested budget if there is one. Otherwise it is the closest budget within ``NEAR`` of the achieved size,
    for the closest row only.
    """
    at = [
        row["budget"]
        if not math.isnan(row["budget"])
        else min(BUDGETS, key=lambda size: abs(size - row["params_kept"]))
        for _, row in together.iterrows()
    ]
    held = together.assign(at=at, off=(together["params_kept"] - pd.Series(at, index=together.index)).abs())
    chosen = held["budget"].notna() | (held["off"] <= NEAR)
    nearest = held[chosen & held["budget"].isna()].sort_values("off", kind="stable")
    again = nearest[nearest.duplicated(["model", "data", "selector", "scratch", "epochs", "at"])].index
    chosen[again] = False
    return [size if is_chosen else math.nan for size, is_chosen in zip(at, chosen, strict=True)]


def _dense(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy of each network's trained dense networks, one per seed."""
    nets = runs.dropna(subset="dense_accuracy").drop_duplicates(["model", "data", "seed"])
    columns = ["model", "data", "dense_accuracy", "dense_accuracy_std"]
    return averages.over_seeds(nets, ("model", "data"), ["dense_accuracy"]).reindex(columns=columns)
