"""Figure 6: what a selection costs against what it reaches, a mark a selector, a panel a net, size and stage."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from spectrim.report import command, figure, selectors, table
from spectrim.report.command import Options
from spectrim.report.selectors import BUDGETS
from spectrim.report.table import Column, Table

LISTED = Path(__file__).with_name("selectors.csv")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = "os^vDPX*dphH8"
DEEPEST = 0.2  # below the dense accuracy: where the panels end
# Of each stage its cost, and what the axis is called.
STAGES = {
    "cut alone": ("cpu_seconds", "CPU seconds (log scale)"),
    "trained": ("read", "images read (log scale)"),
}
COLUMNS = (
    Column("panel", "panel"),
    Column("approach", "selector"),
    Column("asked", "asked for"),
    Column("epochs", "epochs", 0),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("cpu_seconds", "CPU seconds", 1),
    Column("read", "images read", 0),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("n", "n"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over the runs; n as in Table 1, whose notes hold here too. Cut alone: "
    "against the CPU seconds of decomposition, selection and cut. Trained: against the images read to select, "
    "beyond those of the training steps. A size that a selector chose itself stands for the nearest budget, as there.",
    f"The panels end {100 * DEEPEST:.0f} pp below the dense net: a hollow mark on that edge lies below it. A black "
    "edge: trained from scratch.",
)


def build(options: Options) -> list[Path]:
    """Accuracy against cost, a row of panels a net: cut alone at each size, then trained."""
    found = command.load(options)
    listed = selectors.listed(LISTED)
    rows = selectors.rows(options, found, listed)
    rows["stage"] = rows["epochs"].gt(0).map({False: "cut alone", True: "trained"})
    rows["cost"] = [row[STAGES[row["stage"]][0]] for _, row in rows.iterrows()]
    # The sizes of one draw share much of it: by itself a selection costs what the first one did.
    rows["cost"] = rows.groupby(["model", "data", "approach", "stage"])["cost"].transform("max")
    rows = rows[rows["at"].notna() & (rows["cost"] > 0)]
    if rows.empty:
        raise command.lacking(options, "a selector that tells what it cost")
    styles = _styles(rows, listed)
    origin = command.origin(options, found, [LISTED])
    nets = list(rows[["model", "data"]].drop_duplicates().itertuples(index=False, name=None))
    shown: list[pd.DataFrame] = []
    with figure.panels(len(nets), len(STAGES) * len(BUDGETS), 2.5, 2.6) as (canvas, axes):
        places = iter(axes)
        for model, data in nets:
            net = rows[(rows["model"] == model) & (rows["data"] == data)]
            for stage, (_, cost) in STAGES.items():
                for size in BUDGETS:
                    own = net[(net["at"] == size) & (net["stage"] == stage)]
                    title = f"{model}, {data}, {100 * size:.0f} %, {stage}"
                    axis = next(places)
                    _panel(axis, own, title, float(net["dense_accuracy"].iloc[0]), styles)
                    axis.set_xlabel(cost)
                    shown.append(own.assign(panel=title))
        figure.legend(canvas, axes)
        pictures = figure.save(canvas, options.name, options.out, origin)
    drawn = Table(options.name, pd.concat(shown), COLUMNS, "What Figure 6 shows: accuracy and cost", NOTES, "panel")
    return pictures + table.save([drawn], options.out, origin)


def _styles(rows: pd.DataFrame, listed: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each selector that is drawn its mark, the same whatever else is; with a black edge where from scratch."""
    order = {name: place for place, name in enumerate(listed["selector"])}
    found = {}
    for _, row in (
        rows.drop_duplicates("approach").sort_values("selector", key=lambda names: names.map(order)).iterrows()
    ):
        place = order[row["selector"]]
        colour = COLOURS[place % len(COLOURS)]
        found[row["approach"]] = {
            "color": colour,
            "marker": MARKERS[place % len(MARKERS)],
            "markeredgecolor": "#000000" if row["scratch"] else colour,
            "markersize": 5.5,
            "linestyle": "none",
        }
    return found


def _panel(axis: Axes, rows: pd.DataFrame, title: str, dense: float, styles: dict[str, dict[str, Any]]) -> None:
    lowest = 0.0 if math.isnan(dense) else dense - DEEPEST
    axis.axhline(100 * dense, color="#000000", linewidth=1, label="dense")
    for approach, style in styles.items():  # one legend for all panels
        axis.plot([], [], label=approach, **style)
    for _, row in rows.iterrows():
        below, spread = row["test_accuracy"] < lowest, row["test_accuracy_std"]
        axis.errorbar(
            row["cost"],
            100 * max(row["test_accuracy"], lowest),
            yerr=None
            if below or math.isnan(spread)
            else [[100 * min(spread, row["test_accuracy"] - lowest)], [100 * spread]],
            capsize=2,
            clip_on=False,
            **styles[row["approach"]] | ({"markerfacecolor": "none"} if below else {}),
        )
    axis.set(xscale="log", ylabel="top-1 (%)")
    axis.xaxis.set_minor_formatter(NullFormatter())  # they overlap where an axis spans less than two decades
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 100 * lowest))
    axis.set_title(title, fontsize=7)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure6", "table1", arguments)


if __name__ == "__main__":
    sys.exit(main())
