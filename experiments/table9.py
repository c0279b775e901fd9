"""Table 9, the ablation: what joint selection loses or gains where a part is left out, put in or set otherwise."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrim.report import command, frame
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

DEFAULT = "joint selection, default"
# What is said of a setting that is not the default, which is the first of each.
PARTS: dict[str, dict[Any, str]] = {
    "algorithm.refit": {500: "", 0: "no refit", 2000: "refit by 2000 samples"},
    "algorithm.significance": {None: "", 0: "the first order as it is", 4: "the first order as far as it is certain"},
    "algorithm.interaction": {0: "", 1: "interaction of components"},
    "algorithm.step": {0.5: "", 0.1: "five linearisations"},
    "algorithm.samples": {250: "", 1000: "1000 samples"},
    "decomposer": {
        "whitened_spatial": "",
        "svd_spatial": "plain SVD, spatial view",
        "whitened_channel": "whitened SVD, channel view",
        "whitened_best_view": "whitened SVD, better view of each layer",
    },
}
VALUES = (
    "params_kept",
    "test_accuracy",
    "change_test_accuracy_pp",
    "test_loss",
    "change_test_loss",
    "to_default",
    "seconds",
)
COLUMNS = (
    Column("model", "model"),
    Column("method", "what is different"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 to dense pp", 2, signed=True),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss to dense", 4, signed=True),
    Column("to_default", "Δ test loss to the default", 4, signed=True),
    Column("seconds", "seconds", 0),
    Column("n", "n"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over the runs; n = training seeds × calibration seeds (pairs: each training "
    "seed with a calibration draw of its own). No fine-tuning; the test split is looked at once, after the selection. "
    "Δ to the default: to the run of the same seed with the default settings, so that its deviation says how far a "
    "difference is one. Seconds: of the whole run, measured beside other runs on the same machine.",
    "The first order as far as it is certain: each slope is shrunk by four standard errors over the samples. "
    "Interaction of components: the Fisher information off its diagonal. No refit: factors stay as cut. Five "
    "linearisations: after each tenth of the parameters anew, where otherwise all is removed at once.",
)


def build(options: Options) -> list[Path]:
    """Table 9, from the records of its grids."""
    found = command.load(options)
    runs = command.runs(options, found, ["joint"])
    runs["method"] = [_differs({**row["settings"], "decomposer": row["decomposer"]}) for _, row in runs.iterrows()]
    default = runs[runs["method"] == DEFAULT]
    if default.empty:
        raise command.lacking(options, "joint selection with its default settings")
    losses = default.set_index(["model", "seed", "calibration_seed"])["test_loss"]
    keys = zip(runs["model"], runs["seed"], runs["calibration_seed"], strict=True)
    runs["to_default"] = runs["test_loss"] - [float(losses.get(key, float("nan"))) for key in keys]
    runs["parts"] = [0 if method == DEFAULT else 1 + method.count(";") for method in runs["method"]]
    rows = frame.with_dense(runs.sort_values(["model", "parts", "method", "first_signature"], kind="stable"), VALUES)
    rows.loc[rows["method"].isin(["dense", DEFAULT]), ["to_default", "to_default_std"]] = float("nan")
    rows.loc[rows["method"] == "dense", ["seconds", "seconds_std"]] = float("nan")
    caption = f"What each part of joint selection is worth, at one budget, on {', '.join(dict.fromkeys(rows['data']))}"
    return save(
        [Table(options.name, rows, COLUMNS, caption, NOTES, group="model")], options.out, command.origin(options, found)
    )


def _differs(settings: Mapping[str, Any]) -> str:
    """In words, what of a run is not as by default."""
    said = []
    for name, words in PARTS.items():
        value = settings.get(name, next(iter(words)))
        said.append(words.get(value, f"{name.rpartition('.')[2].replace('_', ' ')} {value}"))
    return "; ".join(filter(None, said)) or DEFAULT


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the script; the exit status."""
    return command.run(build, "table9", "table9", arguments)


if __name__ == "__main__":
    sys.exit(main())
