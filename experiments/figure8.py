"""Figure 8: perplexity of decoders against parameters kept, without fine-tuning (records of Table 3)."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import perplexities
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from spectrim.report import averages, command, figure, looks, table
from spectrim.report.command import Options
from spectrim.report.figure import Curve
from spectrim.report.frontier import CURVES
from spectrim.report.table import Column, Table, number

# By the kind of Table 3. Pivoted factors are hollow and dashed. Plain truncation is left out: it is far above all.
UNIFORM, KNAPSACK, JOINT = (CURVES[key] for key in ("truncation", "knapsack", "joint"))
DRAWN = {
    "whitened": replace(UNIFORM, name="whitened SVD, uniform ratio"),
    "whitened_pivoted": replace(UNIFORM, name="whitened SVD, uniform ratio, pivoted"),
    "knapsack_pivoted": replace(KNAPSACK, name="knapsack (BALF), pivoted"),
    "svdllmv2_pivoted": Curve("SVD-LLM V2, pivoted", *looks.ALDS),
    "zerosum_pivoted": Curve("ZS-SVD, pivoted", *looks.SENSITIVITY),
    "lems_pivoted": Curve("LEMS, both sides whitened, pivoted", *looks.ENERGY),
    "joint": JOINT,
    "joint_pivoted": replace(JOINT, name="joint, ours, pivoted"),
    "two_sided_pivoted": Curve("joint, ours, both sides whitened, pivoted", *looks.VERIFIED_JOINT),
    "two_sided_embedding_pivoted": Curve("the same, embedding too", *looks.BEST),
}
OURS = ("joint", "joint_pivoted", "two_sided_pivoted", "two_sided_embedding_pivoted")
TICKS = (10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 5000)
KEYS = ("panel", "kind")
COLUMNS = (
    Column("panel", "model, test corpus"),
    Column("method", "method"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("perplexity", "perplexity", 2),
    Column("n", "n"),
)
NOTES = (
    averages.NOTE,
    "The first corpus of a model is that of its calibration data, on other documents. The dense model is the line. "
    "Table 3 has every other selector, and compares joint selection with its rivals draw by draw.",
)


def build(options: Options) -> list[Path]:
    """Draw one panel per decoder and corpus, one line per selector, and build the table of the same numbers."""
    found = command.load(options)
    lacking = "a selector with a number of parameters on a decoder"
    points, others = perplexities.of_kinds(options, found, DRAWN, lacking)
    values = ["params_kept", "perplexity"]
    rows = pd.concat([_of_corpus(points, name, values) for name in ["", *others]], ignore_index=True)
    origin = command.origin(options, found)
    caption = "Numbers of Figure 8: perplexity without fine-tuning"
    shown = Table(options.name, rows, COLUMNS, caption, NOTES, "panel", ("kind",))
    return _draw(rows, options, origin) + table.save([shown], options.out, origin)


def _of_corpus(points: pd.DataFrame, other: str, values: Sequence[str]) -> pd.DataFrame:
    """Return the means on the test corpus of each model, or on the corpus ``other``, the dense model first."""
    own, dense = perplexities.on_corpus(points, other)
    dense = dense.assign(kind="dense", method="dense", params_kept=1.0)
    return averages.over_seeds(pd.concat([dense, own]), (*KEYS, "method"), values)


def _draw(rows: pd.DataFrame, options: Options, origin: dict) -> list[Path]:
    names = list(dict.fromkeys(rows["panel"]))
    with figure.panels(len(names), 2, 3.4, _title(rows), share="y") as (canvas, axes):
        for name, axis in zip(names, axes, strict=True):
            _panel(axis, rows[rows["panel"] == name], name)
            axis.set(xlabel="parameters kept (%)")
            axis.xaxis.set_major_locator(MultipleLocator(10))
        perplexities.scale(axes, rows["perplexity"], TICKS, 0.15)
        figure.legend(canvas, axes)
        return figure.save(canvas, options.name, options.out, origin)


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    dense = float(rows.loc[rows["kind"] == "dense", "perplexity"].iloc[0])
    axis.axhline(dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
    for kind, curve in DRAWN.items():
        own = rows[rows["kind"] == kind].sort_values("params_kept")
        if own.empty:
            continue
        hollow = kind.endswith("_pivoted")
        axis.errorbar(
            100 * own["params_kept"],
            own["perplexity"],
            yerr=figure.bars(own, "perplexity", 0.9 * dense),
            color=curve.colour,
            marker=curve.marker,
            markerfacecolor="white" if hollow else None,
            linestyle="--" if hollow else "-",
            linewidth=1.2,
            markersize=looks.size(curve.marker, 5),
            capsize=2,
            label=curve.name,
        )
    axis.set(title=title)


def _title(rows: pd.DataFrame) -> str:
    """Return the message: the first panel's lowest perplexities of ours and its rivals, at a size that both have.

    Selections of the same form are compared, pivoted ones where both have them.
    """
    own = rows[rows["panel"] == rows["panel"].iloc[0]]
    name, dense = own["panel"].iloc[0], number(float(own["perplexity"].iloc[0]), 1)
    own = own[own["kind"] != "dense"]
    sizes, ours, pivoted = own["params_kept"].round(2), own["kind"].isin(OURS), own["kind"].str.endswith("_pivoted")
    for form, said in ((pivoted, ", with pivoted factors"), (~pivoted, "")):
        common = sorted(set(sizes[ours & form]) & set(sizes[~ours & form]))
        if common:
            size = common[len(common) // 2]
            there = form & (sizes == size)
            best, rival = (number(own[there & which]["perplexity"].min(), 1) for which in (ours, ~ours))
            return (
                f"{name} at {100 * size:.0f} % of the parameters{said}: perplexity {best} by joint selection, "
                f"{rival} by its best rival here, {dense} dense"
            )
    return f"Perplexity without fine-tuning, by parameters kept; dense: {dense} on {name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure8", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
