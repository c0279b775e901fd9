"""Figure 5: the rank of every layer during SVD training, and the losses that the rank selection measured."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from spectrim.records.records import Record, name_of
from spectrim.report import averages, command, figure, frame, table, trainings
from spectrim.report.command import Options
from spectrim.report.figure import Curve
from spectrim.report.table import Column, Table

FIRST, LAST = (Column("panel", "training"),), (Column("n", "n"),)
RANKS = (*FIRST, Column("layer", "layer"), Column("epoch", "epoch", 0), Column("rank", "rank", 1), *LAST)
LOSSES = (*FIRST, Column("term", "term"), Column("epoch", "epoch", 0), Column("loss", "loss", 4), *LAST)
# Columns that tell trainings apart. ``parts``: the title of the panel in parts. ``main``: whether the main figure shows
# the training, otherwise the appendix does.
KEYS = ("network", "data", "scratch", "setting", "epochs")
ABOUT = (*KEYS, "parts", "main")
NAMING = 3  # parts that tell the trainings of the main figure apart; the table beside it has all
EARLY = 2  # selections, as the title of the figure says
LEFT_OUT = "; here the trainings that the main figure leaves out"

# The curves of the second figure, by a key of the log in a record or of ``_cut``.
TERMS = {
    "loss": Curve("task, in training", "#0072B2", "o"),
    "orthogonality": Curve("orthogonality", "#D55E00", "s"),
    "hoyer": Curve("hoyer", "#009E73", "^"),
    "nuclear": Curve("nuclear", "#CC79A7", "v"),
    "before": Curve("before the cut", "#56B4E9", "D"),
    "after": Curve("after the cut", "#E69F00", "*"),
    "refused": Curve("lowest refused", "#000000", "x"),
}
POINTS = ("after", "refused")  # terms whose points are not joined
DEPTH = matplotlib.colormaps["viridis"]  # from the first layer to the last
Panel = Callable[[Axes, pd.DataFrame], None]
NOTES = (
    "Each number is a mean ± standard deviation (ddof = 1) over training seeds. Epochs are counted from 1. The rank is "
    "that after the selection at the end of the epoch; epoch 0 is the full rank. The name of a training gives its "
    "regulariser with the strength, or none.",
)
LOSS_NOTES = (
    "Each number is a mean ± standard deviation (ddof = 1) over training seeds. Task, orthogonality and regulariser "
    "are means over the epoch, each with its weight in the loss.",
    "Before and after the cut are the losses of the task that the selection at the end of the epoch measured, in eval "
    "mode. Lowest refused is the lowest loss of a truncation that the selection tried and that moved the loss too far.",
)


def build(options: Options) -> list[Path]:
    """Draw ranks and losses of each training, six trainings in the main figures and all others in appendices."""
    found = [record for record in command.load(options) if trainings.is_training(record)]
    if not found:
        raise command.lacking(options, "svd_training")
    shown = _shown(found)
    about = [_about(record, shown) for record in found]
    ranks = pd.DataFrame([own | point for record, own in zip(found, about, strict=True) for point in _ranks(record)])
    losses = pd.DataFrame([own | point for record, own in zip(found, about, strict=True) for point in _losses(record)])
    ranks = averages.over_seeds(ranks, ("panel", "layer", "epoch", *ABOUT), ["rank"])
    losses = averages.over_seeds(losses, ("panel", "term", "epoch", "key", *ABOUT), ["loss"])
    origin = command.origin(options, found)
    drawn = _draw(ranks, _rank_panel, _rank_title(found), options.name, options, origin)
    drawn += _draw(losses, _loss_panel, _loss_title(found), f"{options.name}_losses", options, origin)
    caption, beside = "Numbers of Figure 5: ranks during SVD training", "Losses during the trainings of Figure 5"
    tables = [
        Table(options.name, ranks, RANKS, caption, NOTES, "panel", ABOUT),
        Table(f"{options.name}_losses", losses, LOSSES, beside, LOSS_NOTES, "panel", ("key", *ABOUT)),
    ]
    return drawn + table.save(tables, options.out, origin)


def _training(record: Record) -> tuple[Any, ...]:
    """Return what one panel shows: network, data, start, setting and epochs."""
    epochs = record["config"]["algorithm"]["recipe"]["epochs"]
    start = trainings.net(record), record["names"]["data"], trainings.from_scratch(record)
    return *start, trainings.key(record), epochs


def _shown(found: Sequence[Record]) -> set[tuple[Any, ...]]:
    """Return the trainings of the main figure: for each network, the first from a trained net and from scratch.

    A network is shown on the data set with the most trainings. There are at most six.
    """
    known = sorted({_training(record) for record in found})
    chosen = []
    for network in sorted({training[0] for training in known}, key=frame.model_key):
        own = [training for training in known if training[0] == network]
        data, _ = Counter(training[1] for training in own).most_common(1)[0]
        for scratch in (False, True):
            chosen += [training for training in own if training[1:3] == (data, scratch)][:1]
    return set(chosen[:6])


def _about(record: Record, shown: set[tuple[Any, ...]]) -> dict[str, Any]:
    network, data, *_, epochs = training = _training(record)
    regulariser, *others = trainings.way(record)
    begin, end = (network, data, trainings.start(record)), (*others, f"{epochs} epochs")
    return {
        "panel": ", ".join((*begin, regulariser, *end)),
        **dict(zip(KEYS, training, strict=True)),
        "parts": (*begin, "no regulariser" if regulariser == "none" else regulariser, *end),
        "main": training in shown,
        "record": name_of(record),
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
    }


def _ranks(record: Record) -> list[dict[str, Any]]:
    """Return the rank of each layer after each epoch, the full rank first."""
    full = {layer["layer"]: layer["full_rank"] for layer in record["layers"]}
    steps = [(0, full), *((entry["epoch"] + 1, entry["ranks"]) for entry in record["log"])]
    return [
        {"layer": layer, "epoch": epoch, "rank": ranks[layer]}
        for layer in record["log"][0]["ranks"]
        for epoch, ranks in steps
    ]


def _losses(record: Record) -> list[dict[str, Any]]:
    points = []
    for entry in record["log"]:
        terms = {key: entry[key] for key in TERMS if key in entry} | _cut(entry)
        points += [
            {"key": key, "term": TERMS[key].name, "epoch": entry["epoch"] + 1, "loss": loss}
            for key, loss in terms.items()
        ]
    return points


def _cut(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the task's loss around the selection of an epoch; nothing for an epoch without one."""
    if not entry["bisection"]:
        return {}
    passed = [step["loss"] for step in entry["bisection"] if step["passed"]]
    refused = [step["loss"] for step in entry["bisection"] if not step["passed"]]
    around = {"before": entry["bisection"][0]["loss"], "after": passed[-1]}
    return around | ({"refused": min(refused)} if refused else {})


def _rank_title(found: Sequence[Record]) -> str:
    """Return the message: the part of all removed rank that the first selections remove, as a median."""
    parts = []
    for record in found:
        full = sum(layer["full_rank"] for layer in record["layers"])
        totals = [sum(entry["ranks"].values()) for entry in record["log"] if entry["bisection"]]
        if totals and full > totals[-1]:
            parts.append((full - totals[min(EARLY, len(totals)) - 1]) / (full - totals[-1]))
    if not parts:
        return "No training removes any rank"
    part = f"{100 * median(parts):.0f} %"
    return f"The first two selections remove {part} of all removed rank (median of {len(parts)} runs)"


def _loss_title(found: Sequence[Record]) -> str:
    """Return the message: how many selections moved the task's loss by less than epsilon, as the algorithm promises."""
    moves = [
        abs(cut["after"] - cut["before"]) < record["config"]["algorithm"]["epsilon"]
        for record in found
        for cut in map(_cut, record["log"])
        if cut
    ]
    said = f"In {sum(moves)} of {len(moves)} selections of {len(found)} runs"
    return f"{said}, the cut moved the task's loss by less than ε"


def _draw(
    rows: pd.DataFrame, panel: Panel, title: str, name: str, options: Options, origin: Mapping[str, Any]
) -> list[Path]:
    """Draw the main figure and, if other trainings are left, its appendix."""
    paths = []
    for part, own in figure.parts(name, rows, rows["main"]):
        paths += _draw_one(own, panel, title if part == name else title + LEFT_OUT, part, options, origin)
    return paths


def _draw_one(
    rows: pd.DataFrame, panel: Panel, title: str, name: str, options: Options, origin: Mapping[str, Any]
) -> list[Path]:
    order = rows.drop_duplicates("panel").sort_values(list(KEYS))
    with figure.panels(len(order), 3, 2.4, title) as (canvas, axes):
        for axis, (_, about) in zip(axes, order.iterrows(), strict=True):
            panel(axis, rows[rows["panel"] == about["panel"]])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(_wrapped(about["parts"][:NAMING] if about["main"] else about["parts"]))
            axis.set_xlabel("epoch")
        if panel is _loss_panel:
            figure.legend(canvas, axes, 4)
        else:
            for position, label in ((0.0, "first layer"), (0.5, "middle layer"), (1.0, "last layer")):
                axes[0].plot([], [], color=DEPTH(position), marker="o", markersize=2.5, linewidth=1, label=label)
            figure.legend(canvas, axes)
        return figure.save(canvas, name, options.out, origin)


def _wrapped(parts: Sequence[str]) -> str:
    """Return a title that is broken between its parts only."""
    return fill(", ".join(part.replace(" ", "\u00a0") for part in parts), 30)


def _rank_panel(axis: Axes, rows: pd.DataFrame) -> None:
    groups = list(rows.groupby("layer", sort=False))
    for index, (_, own) in enumerate(groups):
        colour = DEPTH(index / max(len(groups) - 1, 1))
        axis.plot(own["epoch"], own["rank"], color=colour, linewidth=1, marker="o", markersize=2.5)
        spread = own["rank_std"].fillna(0)
        low, high = (own["rank"] - spread).clip(lower=0.5), own["rank"] + spread
        axis.fill_between(own["epoch"], low, high, color=colour, alpha=0.15)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_ylabel("rank")


def _loss_panel(axis: Axes, rows: pd.DataFrame) -> None:
    for key, term in TERMS.items():
        own = rows[(rows["key"] == key) & (rows["loss"] > 0)].sort_values("epoch")
        if len(own):
            alone = key in POINTS
            style: Any = {"markersize": 4.5 if alone else 3, "linewidth": 1, "linestyle": "none" if alone else "-"}
            axis.plot(own["epoch"], own["loss"], color=term.colour, marker=term.marker, label=term.name, **style)
    axis.set_yscale("log")
    axis.set_ylabel("loss (nats)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure5", "table5", arguments)


if __name__ == "__main__":
    sys.exit(main())
