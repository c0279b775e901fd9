"""Figure 5: the rank of every layer while SVD training selects it, and beside it what the selection saw."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from spectrim.records.records import Record
from spectrim.report import command, figure, frame, table, trainings
from spectrim.report.command import Options
from spectrim.report.table import Column, Table

ACROSS = 3
FIRST, LAST = (Column("panel", "training"),), (Column("n", "n"),)
RANKS = (*FIRST, Column("layer", "layer"), Column("epoch", "epoch", 0), Column("rank", "rank", 1), *LAST)
LOSSES = (*FIRST, Column("term", "term"), Column("epoch", "epoch", 0), Column("loss", "loss", 4), *LAST)
# Terms of the loss in a record, and what they are called here.
TERMS = {"loss": "task, in training", "orthogonality": "orthogonality", "hoyer": "hoyer", "nuclear": "nuclear"}
TERMS_SHOWN = (*TERMS.values(), "before the cut", "after the cut", "lowest refused")
Panel = Callable[[Axes, pd.DataFrame], None]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^vD*P"
NOTES = (
    "Mean ± standard deviation (ddof = 1) over training seeds. Epochs are counted from 1; the rank is that after the "
    "selection at the end of the epoch.",
)
LOSS_NOTES = (
    "Mean ± standard deviation (ddof = 1) over training seeds. Task, orthogonality and the regulariser, each with its "
    "weight in the loss: means over the epoch. Before and after the cut: the task's loss that the selection at the end "
    "of the epoch measured, in eval mode; lowest refused: of the truncations that it tried and that moved it too far.",
)


def build(options: Options) -> list[Path]:
    """A panel for each way of training: a line for each layer, and in a second figure the losses; both as tables."""
    found = [record for record in command.load(options) if trainings.is_training(record)]
    if not found:
        raise command.lacking(options, "svd_training")
    about = [_about(record) for record in found]
    ranks = pd.DataFrame([own | point for record, own in zip(found, about, strict=True) for point in _ranks(record)])
    losses = pd.DataFrame([own | point for record, own in zip(found, about, strict=True) for point in _losses(record)])
    ranks = frame.over_seeds(ranks, ("panel", "layer", "epoch"), ["rank"])
    losses = frame.over_seeds(losses, ("panel", "term", "epoch"), ["loss"])
    origin = command.origin(options, found)
    drawn = _draw(ranks, _rank_panel, options.name, options, origin)
    drawn += _draw(losses, _loss_panel, f"{options.name}_losses", options, origin)
    tables = [
        Table(options.name, _one_line(ranks), RANKS, "What Figure 5 shows: ranks under SVD training", NOTES, "panel"),
        Table(f"{options.name}_losses", _one_line(losses), LOSSES, "The losses beside Figure 5", LOSS_NOTES, "panel"),
    ]
    return drawn + [path for one in tables for path in table.save([one], options.out, origin)]


def _draw(rows: pd.DataFrame, panel: Panel, name: str, options: Options, origin: Mapping[str, Any]) -> list[Path]:
    names = sorted(set(rows["panel"]))
    with figure.panels(-(-len(names) // ACROSS), min(len(names), ACROSS), 2.9, 2.5) as (canvas, axes):
        for title, axis in zip(names, axes, strict=False):
            panel(axis, rows[rows["panel"] == title])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title("\n".join(fill(line, 44) for line in title.split("\n")), fontsize=8)
            axis.set_xlabel("epoch")
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        if panel is _loss_panel:  # the same lines in every panel
            figure.legend(canvas, axes)
        return figure.save(canvas, name, options.out, origin)


def _one_line(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(panel=rows["panel"].str.replace("\n", ", "))


def _about(record: Record) -> dict[str, Any]:
    about = f"{trainings.net(record)}, {record['names']['data']}, {trainings.start(record)}"
    epochs = record["config"]["algorithm"]["recipe"]["epochs"]
    panel = f"{about}\n{trainings.way(record)}, {epochs} epochs"
    return {"panel": panel, "seed": record["seed"], "calibration_seed": record["calibration_seed"]}


def _ranks(record: Record) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "epoch": entry["epoch"] + 1, "rank": entry["ranks"][layer]}
        for layer in record["log"][0]["ranks"]
        for entry in record["log"]
    ]


def _losses(record: Record) -> list[dict[str, Any]]:
    points = []
    for entry in record["log"]:
        terms = {label: entry[key] for key, label in TERMS.items() if key in entry}
        if entry["bisection"]:
            terms["before the cut"] = entry["bisection"][0]["loss"]
            terms["after the cut"] = [step for step in entry["bisection"] if step["passed"]][-1]["loss"]
            failed = [step["loss"] for step in entry["bisection"] if not step["passed"]]
            if failed:
                terms["lowest refused"] = min(failed)
        points += [{"term": term, "epoch": entry["epoch"] + 1, "loss": loss} for term, loss in terms.items()]
    return points


def _rank_panel(axis: Axes, rows: pd.DataFrame) -> None:
    groups = list(rows.groupby("layer", sort=False))
    many = len(groups) > len(COLOURS)
    for index, (layer, own) in enumerate(groups):
        # Of a deep net the colour tells how deep a layer is, and only the ends are named.
        colour = matplotlib.colormaps["viridis"](index / (len(groups) - 1)) if many else COLOURS[index]
        label = str(layer) if not many or index in (0, len(groups) - 1) else None
        style: Any = {"markersize": 3, "linewidth": 1, "marker": MARKERS[index % len(MARKERS)]}
        axis.plot(own["epoch"], own["rank"], color=colour, label=label, **style)
        spread = own["rank_std"].fillna(0)
        low, high = (own["rank"] - spread).clip(lower=0.5), own["rank"] + spread
        axis.fill_between(own["epoch"], low, high, color=colour, alpha=0.15)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_ylabel("rank")
    axis.legend(fontsize=6, ncols=2)


def _loss_panel(axis: Axes, rows: pd.DataFrame) -> None:
    for index, term in enumerate(TERMS_SHOWN):
        own = rows[(rows["term"] == term) & (rows["loss"] > 0)].sort_values("epoch")
        if len(own):
            line = "none" if term in ("after the cut", "lowest refused") else "-"
            style: Any = {"markersize": 3, "linewidth": 1, "linestyle": line, "marker": MARKERS[index]}
            axis.plot(own["epoch"], own["loss"], color=COLOURS[index], label=term, **style)
    axis.set_yscale("log")
    axis.set_ylabel("loss (nats)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure5", "table5", arguments)


if __name__ == "__main__":
    sys.exit(main())
