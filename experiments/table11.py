"""Table 11: selectors with a refit, and with refinement after it: the same gradient steps without labels for each."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records.records import Record
from spectrim.report import averages, command, frame
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

SELECTORS = {
    "joint": "joint, ours",
    "knapsack": "knapsack (BALF), refitted as ours",
}
DONE = ("inputs", "samples", "distance_before", "distance_after", "refine_seconds")
VALUES = (
    "params_kept",
    "macs_kept",
    "test_accuracy",
    "change_test_accuracy_pp",
    "change_test_loss",
    *DONE,
    "select_seconds",
)
COLUMNS = (
    Column("model", "model"),
    Column("variant", "selector"),
    Column("refined", "refined"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("distance_before", "KL before", 4),
    Column("distance_after", "KL after", 4),
    Column("inputs", "inputs", 0),
    Column("samples", "samples", 0),
    Column("refine_seconds", "seconds of refinement", 0),
    Column("select_seconds", "seconds in all", 0),
    Column("n", "n"),
)
PAPER = ("variant", "refined", "params_kept", "change_test_accuracy_pp", "change_test_loss", "distance_after")
KEYS = (*frame.KEYS, "asked")
NOTES = (
    averages.NOTE,
    "Refinement: steps of Muon on the factors, and of Adam on biases and BatchNorm, from the refitted model, towards "
    "the class scores of the dense network at temperature 4. It reads no label. There is no fine-tuning, and no "
    "selector sees the test split. Both selectors have the same decomposition, the same refit and the same refinement.",
    "Pivoted factors save no multiplication in convolutions, so MACs may rise. Refinement leaves them as they are.",
    "KL: the mean divergence from the dense network's class scores, in nats, on held-out calibration inputs. The "
    "weights with the smallest one are kept. Inputs: different images that the steps read, all from the training set. "
    "Samples: images in all steps. Seconds are those of one run beside others on the same machine.",
)


def build(options: Options) -> list[Path]:
    """Build Table 11."""
    found = command.load(options)
    runs = command.runs(options, found, ["joint", "refitted"])
    runs = runs.merge(pd.DataFrame([_refinement(record) for record in found]), on="signature")
    runs["variant"] = [SELECTORS[_selector(settings)] for settings in runs["settings"]]
    runs["asked"] = [_asked(settings) for settings in runs["settings"]]
    runs["method"] = runs["variant"] + ", " + runs["asked"].astype(str) + ", " + runs["refined"]
    frame.require_one_setting(runs, ["model", "data", "method"], "{method} on {model}, {data}", "a row has one setting")
    runs["place"] = [list(SELECTORS.values()).index(variant) for variant in runs["variant"]]
    runs["size"] = -runs["asked"]
    runs = runs.sort_values(["model", "size", "place", "refined", "first_signature"], kind="stable")
    about = runs.drop_duplicates(["network", "data", "method"])[["network", "data", "method", "refined", "asked"]]
    rows = averages.with_dense(runs, VALUES).merge(about, "left", ["network", "data", "method"])
    dense = rows["algorithm"] == "dense"
    rows.loc[dense, [key + tail for key in (*DONE, "select_seconds") for tail in ("", "_std")]] = math.nan
    caption = f"Selectors with and without refinement, without labels, on {frame.data_of(rows)}"
    table = Table(options.name, rows, COLUMNS, caption, NOTES, group="model", hidden=KEYS)
    paper = table.paper(PAPER, notes=[averages.seeds_note(rows)])
    return save([table, paper], options.out, command.origin(options, found))


def _refinement(record: Record) -> dict[str, Any]:
    """Return what the log of a run says of its refinement; NaN where there is none."""
    entry = record["log"][-1] if record["log"] else {}
    refined = "distance_after" in entry
    said = {**entry, "refine_seconds": entry["seconds"]} if refined else {}
    return {
        "signature": record["signature"],
        "refined": "yes" if refined else "no",
        **{key: said.get(key, math.nan) for key in DONE},
        "select_seconds": record["phases"]["select"]["seconds"],
    }


def _selector(settings: Mapping[str, Any]) -> str:
    """Return the class of the selector in lower case, that inside of a refit too."""
    return str(settings.get("algorithm.selector._class_", settings["algorithm._class_"])).lower()


def _asked(settings: Mapping[str, Any]) -> float:
    """Return the share of the parameters that was asked for."""
    return float(settings.get("algorithm.selector.params_kept", settings.get("algorithm.params_kept")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table11", "table11", arguments)


if __name__ == "__main__":
    sys.exit(main())
