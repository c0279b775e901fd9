"""Figure 6: accuracy against the cost of a selection, one panel per network, stage and size."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from spectrim.report import command, figure, looks, selectors, table
from spectrim.report.command import Options
from spectrim.report.looks import Look
from spectrim.report.selectors import BUDGETS
from spectrim.report.table import Column, Table, number

LISTED = Path(__file__).with_name("selectors.csv")
# In the order of the legend, ours first.
LOOKS: Mapping[str, Look] = {
    "joint": looks.JOINT,
    "joint, pivoted": looks.BEST,
    "knapsack": looks.KNAPSACK,
    "lossless": looks.LOSSLESS,
    "compact": looks.COMPACT,
    "reinforced": looks.REINFORCED,
    "bayesian": looks.BAYESIAN,
    "evbmf": looks.EVBMF,
    "layerthreshold": looks.LAYER_THRESHOLD,
    "pars": looks.PARS,
    "haloc": looks.HALOC,
    "cuttlefish": looks.CUTTLEFISH,
    "l0gates": looks.L0_GATES,
    "svdtraining": looks.SVD_TRAINING,
}
NETWORK = ("resnet20", "cifar10")  # the figure shows this one, its appendix all others
DEEPEST = 0.2  # accuracy below the dense network's at which a panel ends
# The cost that each stage is drawn against, and the label of the axis.
STAGES = {"cut alone": ("cpu_seconds", "CPU seconds"), "trained": ("read", "images read")}
COLUMNS = (
    Column("panel", "panel"),
    Column("approach", "selector"),
    Column("asked", "requested"),
    Column("epochs", "epochs", 0),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("cpu_seconds", "CPU seconds", 1),
    Column("read", "images read", 0),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("n", "n"),
)
PAPER = ("panel", "approach", "params_kept", "cpu_seconds", "read", "test_accuracy")
NOTES = (
    "Each number is a mean ± standard deviation (ddof = 1) over the runs. The column n and the sizes are those of "
    "Table 1, whose notes apply. Cut alone shows the CPU seconds of decomposition, selection and cut. Trained shows "
    "the images read to select, without those of the training steps.",
    f"The panels end {100 * DEEPEST:.0f} points below the dense network. A hollow marker on that edge lies below it. A "
    "black edge marks a training from scratch.",
)


def build(options: Options) -> list[Path]:
    """Draw accuracy against cost, one panel per network, stage and size, and build the table of the same numbers."""
    found = command.load(options)
    listed = selectors.listed(LISTED)
    rows = selectors.rows(selectors.runs(options, found, listed), listed)
    rows["stage"] = rows["epochs"].gt(0).map({False: "cut alone", True: "trained"})
    rows["cost"] = [row[STAGES[row["stage"]][0]] for _, row in rows.iterrows()]
    # The sizes of one draw share work, so the first size costs what a selection costs by itself.
    rows["cost"] = rows.groupby(["model", "data", "selector", "scratch", "stage"])["cost"].transform("max")
    rows = rows[rows["at"].notna() & (rows["cost"] > 0)]
    if rows.empty:
        raise command.lacking(options, "a selector that tells what it cost")
    origin = command.origin(options, found, [LISTED])
    nets = list(zip(rows["model"], rows["data"], strict=True))
    first = NETWORK if NETWORK in nets else nets[0]
    pictures: list[Path] = []
    for name, own in figure.parts(options.name, rows, pd.Series([net == first for net in nets], index=rows.index)):
        pictures += _draw(_panels(own), name, options, origin)
    shown = pd.concat([panel.rows.assign(panel=panel.title) for panel in _panels(rows)])
    beside = Table(options.name, shown, COLUMNS, "Numbers of Figure 6: accuracy and cost", NOTES, "panel")
    return pictures + table.save([beside, beside.paper(PAPER)], options.out, origin)


@dataclass(frozen=True)
class Panel:
    """One panel: the selectors of a network at one stage and size. ``dense``: the dense network's accuracy."""

    model: str
    data: str
    stage: str
    size: float
    dense: float
    rows: pd.DataFrame

    @property
    def lowest(self) -> float:
        """The accuracy at which the panel ends."""
        return 0.0 if math.isnan(self.dense) else self.dense - DEEPEST

    @property
    def title(self) -> str:
        """The title of the panel in the table."""
        return f"{self.model}, {self.data}, {100 * self.size:.0f} %, {self.stage}"


def _panels(rows: pd.DataFrame) -> list[Panel]:
    """Return the panels of each network, in the order of the rows."""
    found = []
    for (model, data), net in rows.groupby(["model", "data"], sort=False):
        for stage in STAGES:
            for size in BUDGETS:
                own = net[(net["at"] == size) & (net["stage"] == stage)]
                found.append(Panel(str(model), str(data), stage, size, float(net["dense_accuracy"].iloc[0]), own))
    return found


def _draw(panels: Sequence[Panel], name: str, options: Options, origin: Mapping[str, Any]) -> list[Path]:
    with figure.panels(len(panels), 3, 2.6, _message(panels)) as (canvas, axes):
        for panel, axis in zip(panels, axes, strict=True):
            _draw_panel(axis, panel)
        for axis in axes[::3]:
            axis.set_ylabel("top-1 (%)")
        names = pd.concat([panel.rows for panel in panels]).drop_duplicates("approach")
        order = names["selector"].map(list(LOOKS).index)
        for _, row in names.iloc[order.argsort(kind="stable")].iterrows():
            axes[0].plot([], [], label=row["approach"], **_style(row))
        if any((panel.rows["test_accuracy"] < panel.lowest).any() for panel in panels):
            axes[0].plot([], [], "o", color="#999999", markerfacecolor="none", label="hollow: below the panel")
        figure.legend(canvas, axes, 2)
        return figure.save(canvas, name, options.out, origin)


def _message(panels: Sequence[Panel]) -> str:
    """Return the message: joint selection beside the best other selector, cut alone to the smallest size.

    All are compared with plain factors, the only ones that the rivals have.
    """
    size = min(BUDGETS)
    reached = {}
    for panel in (one for one in panels if (one.stage, one.size) == ("cut alone", size)):
        alike = panel.rows[~selectors.pivoted(panel.rows)]
        ours, others = (alike[(alike["selector"] == "joint") == same] for same in (True, False))
        if len(ours) and len(others):
            best = others.iloc[int(others["test_accuracy"].argmax())]
            reached[panel.model] = (*_reached(ours.iloc[0]), *_reached(best))
    if len(reached) == 1:
        ((model, (top1, seconds, rival, longer)),) = reached.items()
        return (
            f"{model} cut to {100 * size:.0f} %: joint selection keeps {top1} % accuracy in {seconds} CPU seconds, the "
            f"best other selector {rival} % in {longer}"
        )
    if reached:
        said = (f"{top1} and {rival} % ({model})" for model, (top1, _, rival, _) in reached.items())
        return f"Cut to {100 * size:.0f} %, joint selection and the best other selector keep {', '.join(said)} accuracy"
    return f"Accuracy and cost of every selector on {', '.join(dict.fromkeys(one.model for one in panels))}"


def _reached(row: "pd.Series[Any]") -> tuple[str, str]:
    """Return the accuracy in percent and the cost in seconds, as text."""
    return number(100 * row["test_accuracy"], 1), number(row["cost"], 0 if row["cost"] >= 10 else 1)


def _style(row: "pd.Series[Any]") -> dict[str, Any]:
    """Return how the points of a selector are drawn, which does not depend on the selectors that were run."""
    colour, marker = LOOKS[row["selector"]]
    edge = "#000000" if row["scratch"] else colour
    size = looks.size(marker, 5.5)
    return {"color": colour, "marker": marker, "markeredgecolor": edge, "markersize": size, "linestyle": "none"}


def _draw_panel(axis: Axes, panel: Panel) -> None:
    lowest = panel.lowest
    axis.axhline(100 * panel.dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
    for _, row in panel.rows.iterrows():
        below, spread = row["test_accuracy"] < lowest, row["test_accuracy_std"]
        hollow = {"markerfacecolor": "none"} if below else {}
        axis.errorbar(
            row["cost"],
            100 * max(row["test_accuracy"], lowest),
            yerr=None
            if below or math.isnan(spread)
            else [[100 * min(spread, row["test_accuracy"] - lowest)], [100 * spread]],
            capsize=2,
            clip_on=False,
            **_style(row) | hollow,
        )
    axis.set(xscale="log", xlabel=STAGES[panel.stage][1])
    axis.xaxis.set_minor_formatter(NullFormatter())  # its labels overlap on an axis of less than two decades
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 100 * lowest))
    axis.set_title(f"{panel.model}, {100 * panel.size:.0f} %, {panel.stage}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure6", "table1", arguments)


if __name__ == "__main__":
    sys.exit(main())
