"""Figure 5: the rank of every layer while SVD training selects it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from spectrim.records import Record
from spectrim.report import command, figure, frame, table
from spectrim.report.command import Options
from spectrim.report.table import Column, Table

ACROSS = 3
COLUMNS = (
    Column("panel", "training"),
    Column("layer", "layer"),
    Column("epoch", "epoch", 0),
    Column("rank", "rank", 1),
    Column("n", "n"),
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^vD*P"
NOTES = (
    "Mean ± standard deviation (ddof = 1) over training seeds. Epochs are counted from 1; the rank is that after the "
    "selection at the end of the epoch.",
)


def build(options: Options) -> list[Path]:
    """A panel for each way of training, a line for each layer, and the table of what is drawn."""
    found = [record for record in command.load(options) if _is_training(record)]
    if not found:
        raise command.lacking(options, "svd_training")
    points = pd.DataFrame([point for record in found for point in _points(record)])
    rows = frame.over_seeds(points, ("panel", "layer", "epoch"), ["rank"])
    origin = command.origin(options, found)
    names = sorted(set(rows["panel"]))
    with figure.panels(-(-len(names) // ACROSS), min(len(names), ACROSS), 2.9, 2.4) as (canvas, axes):
        for name, axis in zip(names, axes, strict=False):
            _panel(axis, rows[rows["panel"] == name], name)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        axes[0].legend(fontsize=7, ncols=2)
        pictures = figure.save(canvas, options.name, options.out, origin)
    caption = "What Figure 5 shows: ranks under SVD training"
    drawn = rows.assign(panel=rows["panel"].str.replace("\n", ", "))
    return pictures + table.save(
        [Table(options.name, drawn, COLUMNS, caption, NOTES, group="panel")], options.out, origin
    )


def _is_training(record: Record) -> bool:
    return str(record["config"]["algorithm"]["_target_"]).endswith(".SVDTraining")


def _points(record: Record) -> list[dict[str, Any]]:
    settings = record["config"]["algorithm"]
    start = "from scratch" if record["config"]["checkpoint"] is None else "from a trained net"
    strength = "" if settings["regulariser"] == "none" else f" {settings['strength']:g}"
    net = f"{record['names']['model'].removesuffix('_untrained')}, {record['names']['data']}"
    panel = f"{net}, {start}\n{settings['regulariser']}{strength}, ε {settings['epsilon']:g}"
    about = {"panel": panel, "seed": record["seed"], "calibration_seed": record["calibration_seed"]}
    return [
        about | {"layer": layer, "epoch": entry["epoch"] + 1, "rank": entry["ranks"][layer]}
        for layer in record["log"][0]["ranks"]
        for entry in record["log"]
    ]


def _panel(axis: Axes, rows: pd.DataFrame, name: str) -> None:
    for index, (layer, own) in enumerate(rows.groupby("layer", sort=False)):
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index % len(MARKERS)]
        axis.plot(own["epoch"], own["rank"], color=colour, marker=marker, markersize=3, linewidth=1, label=str(layer))
        spread = own["rank_std"].fillna(0)
        axis.fill_between(
            own["epoch"], (own["rank"] - spread).clip(lower=0.5), own["rank"] + spread, color=colour, alpha=0.15
        )
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(name, fontsize=8)
    axis.set_xlabel("epoch")
    axis.set_ylabel("rank")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the script; the exit status."""
    return command.run(build, "figure5", "table5", arguments)


if __name__ == "__main__":
    sys.exit(main())
