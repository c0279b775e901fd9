"""Table 9: ablation of joint selection. Each row changes one or two of its settings."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.report import averages, command, frame, paired
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

DEFAULT = "joint selection, default"
# The printed name of each value of a setting. The first value of a setting is its default.
PARTS: dict[str, dict[Any, str]] = {
    "factors": {"pivoted": "", "plain": "plain factors"},
    "decomposer": {
        "pivoted": "",
        "whitened_best_view": "",
        "two_sided": "spectrum whitened on both sides",
        "best_view": "spectrum of the weights",
        "whitened_channel": "channel view",
    },
    "algorithm.refit": {500: "", 0: "no refit", 2000: "refit by 2000 samples", 5000: "refit by 5000 samples"},
    "algorithm.refit_by": {"outputs": "", "loss": "refit by the loss"},
    "refits": {1: "", 2: "refit twice"},
    "algorithm.ranks": {"knapsack": "", "greedy": "greedy ranks"},
    "algorithm.significance": {None: "", 0: "the first order as it is", 4: "the first order as far as it is certain"},
    "algorithm.interaction": {0: "", 1: "interaction of components"},
    "algorithm.step": {1.0: "", 0.1: "five expansions"},
    "algorithm.samples": {250: "", 1000: "1000 samples", 2000: "2000 samples", 5000: "5000 samples"},
}
VALUES = (
    "params_kept",
    "macs_kept",
    "test_accuracy",
    "change_test_accuracy_pp",
    "test_loss",
    "change_test_loss",
    "to_default",
    "seconds",
)
COLUMNS = (
    Column("model", "model"),
    Column("method", "change"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 to dense pp", 2, signed=True),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss to dense", 4, signed=True),
    Column("to_default", "Δ test loss to the default", 4, signed=True),
    Column("to_default_p", "its p", 3),
    Column("seconds", "seconds", 0),
    Column("n", "n"),
)
PAPER = ("model", "method", "params_kept", "test_accuracy", "change_test_loss", "to_default")
NOTES = (
    averages.NOTE,
    "There is no fine-tuning. The test split is used once, after the selection. Δ to the default is the change to the "
    "run of the same seed with the default settings, so its deviation shows how certain a difference is; its p is that "
    "of a two-sided paired t-test. Seconds are those of the whole run, measured beside other runs on the same machine.",
    "The default of this table: pivoted factors of the whitened spectrum in the better view of each layer, ranks by "
    "the knapsack, a refit in which all outputs of a layer count alike. Refit by the loss, the default of the library: "
    "an error counts as much as the loss feels it. "
    "The first order as far as it is certain: each slope is shrunk by several standard errors over the samples. "
    "Greedy ranks: one component is removed after another. Interaction of components: the Fisher information off its "
    "diagonal is included. No refit: the factors stay as cut. Five expansions: the loss is expanded anew on the way. "
    "Whitened on both sides: by the inputs, and by the gradients at the outputs (K-FAC). 5000 samples: every held-out "
    "image, the same ones for all trainings, so their first 500, which whiten, are others than those of the default.",
)


def build(options: Options) -> list[Path]:
    """Build Table 9."""
    found = command.load(options)
    runs = command.runs(options, found, ["joint", "refitted"])
    changes = [_changes(_settings(row)) for _, row in runs.iterrows()]
    runs["method"] = ["; ".join(own) or DEFAULT for own in changes]
    runs["changes"] = [len(own) for own in changes]
    default = runs[runs["changes"] == 0]
    if default.empty:
        raise command.lacking(options, "joint selection with its default settings")
    losses = default.set_index(["model", "seed", "calibration_seed"])["test_loss"]
    keys = zip(runs["model"], runs["seed"], runs["calibration_seed"], strict=True)
    runs["to_default"] = runs["test_loss"] - [float(losses.get(key, float("nan"))) for key in keys]
    runs.loc[runs["changes"] == 0, "to_default"] = float("nan")
    rows = averages.with_dense(
        runs.sort_values(["model", "changes", "method", "first_signature"], kind="stable"), VALUES
    )
    dense = rows["algorithm"] == "dense"
    rows["to_default_p"] = [
        paired.p_value(*one) for one in zip(rows["to_default"], rows["to_default_std"], rows["runs"], strict=True)
    ]
    rows.loc[dense, ["to_default", "to_default_std", "seconds", "seconds_std"]] = float("nan")
    caption = f"Ablation of joint selection at one budget, on {frame.data_of(rows)}"
    table = Table(options.name, rows, COLUMNS, caption, NOTES, group="model", hidden=frame.KEYS)
    return save(
        [table, table.paper(PAPER, notes=[averages.seeds_note(rows)])], options.out, command.origin(options, found)
    )


def _settings(run: "pd.Series[Any]") -> dict[str, Any]:
    """Return the settings of joint selection in a run, with how often its refit ran."""
    inside, settings = "algorithm.selector.", run["settings"]
    again = run["algorithm"] == "refitted"
    if again:
        settings = {key.replace(inside, "algorithm."): value for key, value in settings.items() if inside in key}
    return {**settings, "decomposer": run["decomposer"], "factors": run["factors"], "refits": 1 + again}


def _changes(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings of a run that differ from the defaults, in words."""
    said = []
    for name, words in PARTS.items():
        value = frame.setting(settings, name)
        said.append(words.get(value, f"{name.rpartition('.')[2].replace('_', ' ')} {value}"))
    return [words for words in said if words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table9", "table9", arguments)


if __name__ == "__main__":
    sys.exit(main())
