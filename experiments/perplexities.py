"""Perplexities of decoders corpus by corpus, and their axis: what Figures 8 and 9 share."""

from collections.abc import Collection, Sequence

import pandas as pd
import table3
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from spectrim.records.records import Record
from spectrim.report import command
from spectrim.report.command import Options


def of_kinds(
    options: Options, found: Sequence[Record], kinds: Collection[str], lacking: str
) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of some kinds of Table 3, without the embedding, and the corpora beside that of calibration.

    Raises ``UserError`` where there is no run; ``lacking`` says of what.
    """
    runs = table3.described(command.runs(options, found, table3.ALGORITHMS))
    others = table3.add_perplexities(runs, found)
    points = runs[runs["kind"].isin(kinds) & ~runs["embedding"] & runs["perplexity"].notna()]
    if points.empty:
        raise command.lacking(options, lacking)
    return points, others


def on_corpus(points: pd.DataFrame, other: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs on the test corpus of each model, or on the corpus ``other``, and the dense models there."""
    tail = f"_{other}" if other else ""
    own = points.assign(
        panel=points["model"] + ", " + (other or points["data"]),
        perplexity=points[f"perplexity{tail}"],
        dense=points[f"dense_perplexity{tail}"],
    ).dropna(subset="perplexity")
    dense = own.drop_duplicates(["panel", "seed"])
    return own, dense.assign(calibration_seed=None, perplexity=dense["dense"])


def scale(axes: Sequence[Axes], perplexities: "pd.Series[float]", ticks: Sequence[float], margin: float) -> None:
    """Make the axis of perplexities logarithmic, with ``margin`` as a part of the lowest and of the highest one."""
    low, high = (1 - margin) * perplexities.min(), (1 + margin) * perplexities.max()
    for axis in axes:
        axis.set(yscale="log", ylim=(low, high), ylabel="perplexity")
        axis.set_yticks([tick for tick in ticks if low <= tick <= high])
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
