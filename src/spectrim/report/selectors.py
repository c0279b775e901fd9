"""Records of rank selectors → a row for each selector, size and length of training: what Table 1 and Figure 6 share."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.records import Record
from spectrim.report import command, frame, trainings
from spectrim.report.command import Options

BUDGETS = (0.7, 0.5, 0.3)  # parts of the parameters
NEAR = 0.05  # of the parameters: how near a size that was not asked for stands for one of them
LISTED = ("selector", "approach", "layers", "strategy", "timing", "note")
BY = ("model", "data", "selector", "scratch", "asked", "budget", "epochs")
VALUES = ("params_kept", "test_accuracy", "test_loss", "seconds", "cpu_seconds", "read", "passes")


def listed(path: Path) -> pd.DataFrame:
    """The selectors in the order of the table: the name of their class in small letters, what a row is called, the
    source's three labels (empty where it has none) and a footnote (empty).

    Raises UserError where the file is missing or a column is.
    """
    try:
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list of selectors {path}: {error}") from error
    missing = [column for column in LISTED if column not in found]
    if missing:
        raise UserError(f"{path} lacks the column {', '.join(missing)}")
    return found


def rows(options: Options, found: Sequence[Record], selectors: pd.DataFrame) -> pd.DataFrame:
    """One row a net, selector, size asked for and number of epochs trained (0: cut alone), seeds taken together.

    Columns: ``BY``; each of ``VALUES`` and its ``_std``; ``runs``, ``n``; ``approach``; ``at``, the budget that the row
    stands for, NaN where it is near none; ``dense_accuracy`` of the trained nets of the same seeds, and its ``_std``.
    Raises UserError without a run of any of them, and where one row would be of several settings.
    """
    order = {name: place for place, name in enumerate(selectors["selector"])}
    known = frame.runs(found).set_index("signature")
    runs = pd.DataFrame([_run(one, known.loc[one["signature"]]) for one in found if _name(one) in order])
    if runs.empty:
        raise command.lacking(options, "a selector of this table")
    for (model, data, name, scratch, asked, _, epochs), own in runs.groupby(list(BY), dropna=False):
        if own["setting"].nunique() > 1:
            what = f"{own['setting'].nunique()} settings of {name} at {asked}, {epochs} epochs, on {model}, {data}"
            start = " from scratch" if scratch else ""
            raise UserError(f"the records hold {what}{start}: they share one row; delete the older records")
    runs["place"] = runs["selector"].map(order)
    runs["size"] = -runs["params_kept"]
    runs = runs.sort_values(["model", "data", "place", "scratch", "epochs", "size", "asked"], kind="stable")
    together = frame.over_seeds(runs, BY, VALUES)
    together["approach"] = together["selector"].map(selectors.set_index("selector")["approach"])
    together.loc[together["scratch"], "approach"] += ", from scratch"
    together["at"] = _stands_for(together)
    return together.merge(_dense(runs), "left", ["model", "data"])


def _name(record: Record) -> str:
    """The class of the selector, of fine-tuning that of what it trains after, in small letters."""
    chosen = record["config"]["algorithm"]
    return records.class_of(chosen.get("selector", chosen)).lower()


def _run(record: Record, run: Any) -> dict[str, Any]:
    chosen = record["config"]["algorithm"]
    selector = chosen.get("selector", chosen)
    scratch = record["config"]["checkpoint"] is None
    budget = selector.get("params_kept")
    read = sum(record["samples_read"].values()) if "samples_read" in record else math.nan
    return {
        "model": trainings.net(record),
        "data": record["names"]["data"],
        "selector": _name(record),
        "scratch": scratch,
        "asked": _asked(record, selector),
        "budget": math.nan if budget is None else float(budget),
        "epochs": chosen.get("recipe", {}).get("epochs", 0),
        "setting": records.signature({key: value for key, value in run["settings"].items() if not _is_seed(key)}),
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
        "params_kept": run["params_kept"],
        "test_accuracy": run["test_accuracy"],
        "test_loss": run["test_loss"],
        # Before a training from scratch the dense net knows nothing.
        "dense_accuracy": math.nan if scratch else run["dense_test_accuracy"],
        "seconds": trainings.seconds(record),
        "cpu_seconds": trainings.seconds(record, "cpu_seconds"),
        "read": read,
        "passes": read / record["config"]["data"]["calibration_size"],
    }


def _is_seed(key: str) -> bool:
    return key in frame.SEEDS or key.endswith(".seed")


def _asked(record: Record, selector: Mapping[str, Any]) -> str:
    """What a run was to meet, in words."""
    if selector.get("params_kept") is not None:
        return f"{100 * selector['params_kept']:g} %"
    if trainings.is_training(record):
        return trainings.way(record)
    return {True: "verified", False: "one-shot"}.get(selector.get("verified", ""), "its own choice")


def _stands_for(together: pd.DataFrame) -> list[float]:
    """Of each row the budget asked for, or the nearest within ``NEAR`` of a size of its own; one row a budget."""
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
    """Of each net the accuracy of its trained dense nets, one a seed."""
    nets = runs.dropna(subset="dense_accuracy").drop_duplicates(["model", "data", "seed"])
    columns = ["model", "data", "dense_accuracy", "dense_accuracy_std"]
    return frame.over_seeds(nets, ("model", "data"), ["dense_accuracy"]).reindex(columns=columns)
