"""Figure 9: perplexity of decoders against the text that they are calibrated on (records of Table 3)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import perplexities
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from spectrim.report import averages, command, figure, looks, table
from spectrim.report.command import Options
from spectrim.report.looks import Look
from spectrim.report.table import Column, Table, number

USUAL, OWN, AUTO = "of the corpus", "own text too", "of the corpus, slopes auto"
KINDS = {
    "two_sided_less_text_pivoted": USUAL,
    "two_sided_pivoted": USUAL,
    "two_sided_more_text_pivoted": USUAL,
    "two_sided_own_text_pivoted": OWN,
    "two_sided_more_text_auto_pivoted": AUTO,
}
# Of sizes: shades of the one method.
LOOKS = {0.9: Look("#DD9999", "o"), 0.8: looks.BEST, 0.7: Look("#2A0000", "s")}
TICKS = (20, 30, 40, 50, 60, 80, 100, 150, 200, 300)
KEYS = ("panel", "requested", "text", "tokens")
COLUMNS = (
    Column("panel", "model, test corpus"),
    Column("requested", "params kept %", 0, scale=100),
    Column("text", "calibration text"),
    Column("tokens", "calibration tokens", 0),
    Column("perplexity", "perplexity", 2),
    Column("n", "n"),
)
NOTES = (
    averages.NOTE,
    "Joint selection with pivoted factors of the spectrum whitened on both sides. The first corpus of a model is that "
    "of its calibration texts, on other documents. Own text: half of the tokens are of text that the model wrote "
    "itself. Slopes auto: they are believed as far as samples that did not choose confirm; else beyond four standard "
    "errors. The dense model is the line.",
)


def build(options: Options) -> list[Path]:
    """Draw one panel per decoder and corpus, one line per size, and build the table of the same numbers."""
    found = command.load(options)
    lacking = "joint selection on a decoder, whitened on both sides and pivoted"
    points, others = perplexities.of_kinds(options, found, KINDS, lacking)
    given = points["settings"]
    points = points.assign(
        text=points["kind"].map(KINDS),
        tokens=[(one["data.calibration_size"] + one.get("data.own_text", 0)) * one["data.context"] for one in given],
    )
    rows = pd.concat([_of_corpus(points, name) for name in ["", *others]], ignore_index=True)
    origin = command.origin(options, found)
    shown = Table(options.name, rows, COLUMNS, "Numbers of Figure 9: perplexity by calibration text", NOTES, "panel")
    return _draw(rows, options, origin) + table.save([shown], options.out, origin)


def _of_corpus(points: pd.DataFrame, other: str) -> pd.DataFrame:
    """Return the means on the test corpus of each model, or on the corpus ``other``, the dense model last."""
    own, dense = perplexities.on_corpus(points, other)
    dense = dense.assign(requested=1.0, text="none: dense", tokens=0)
    own = own.sort_values(["panel", "requested", "text", "tokens"], ascending=[True, False, True, True], kind="stable")
    return averages.over_seeds(pd.concat([own, dense]), KEYS, ["perplexity"])


def _draw(rows: pd.DataFrame, options: Options, origin: dict) -> list[Path]:
    names = list(dict.fromkeys(rows["panel"]))
    with figure.panels(len(names), 2, 3.2, _title(rows), share="y") as (canvas, axes):
        for name, axis in zip(names, axes, strict=True):
            _panel(axis, rows[rows["panel"] == name], name)
            axis.set(xlabel="calibration tokens (thousands)")
        perplexities.scale(axes, rows["perplexity"], TICKS, 0.1)
        figure.legend(canvas, axes)
        return figure.save(canvas, options.name, options.out, origin)


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    dense = float(rows.loc[rows["tokens"] == 0, "perplexity"].iloc[0])
    axis.axhline(dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
    for size, (colour, marker) in LOOKS.items():
        for text in dict.fromkeys(KINDS.values()):
            own = rows[(rows["requested"] == size) & (rows["text"] == text)]
            if own.empty:
                continue
            usual, own_marker = text == USUAL, marker if text != AUTO else "D"
            axis.errorbar(
                own["tokens"] / 1000,
                own["perplexity"],
                yerr=figure.bars(own, "perplexity", 0.9 * dense),
                color=colour,
                marker=own_marker,
                markerfacecolor=None if usual else "white",
                linestyle="-" if usual else "none",
                linewidth=1.2,
                markersize=looks.size(own_marker, 5),
                capsize=2,
                label=f"{100 * size:g} %{'' if usual else ', ' + text.removeprefix(USUAL + ', ')}",
            )
    axis.set(title=title, xscale="log")
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(rows.loc[rows["tokens"] > 0, "tokens"] / 1000))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _title(rows: pd.DataFrame) -> str:
    """Return the message: what the least and the most text give at the size with most doses, corpus by corpus."""
    doses = rows[rows["text"] == USUAL]
    counts = doses.groupby("requested", sort=False)["tokens"].nunique()
    size: Any = counts.idxmax()  # the largest of several
    said = []
    for panel, own in doses[doses["requested"] == size].groupby("panel", sort=False):
        corpus, by_tokens = str(panel).partition(", ")[2], own.set_index("tokens")["perplexity"].sort_index()
        first, last = (number(float(by_tokens.iloc[at]), 1) for at in (0, -1))
        auto = rows[(rows["panel"] == panel) & (rows["requested"] == size) & (rows["text"] == AUTO)]
        beside = "".join(f" ({number(float(one), 1)} with slopes auto)" for one in auto["perplexity"])
        said.append(f"from {first} to {last}{beside} on {corpus}")
    least, most = (f"{doses['tokens'].agg(which) / 1000:.0f}" for which in ("min", "max"))
    return f"From {least} to {most} thousand tokens, the perplexity at {100 * size:g} % goes {' and '.join(said)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure9", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
