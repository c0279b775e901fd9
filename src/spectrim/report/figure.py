"""Save a matplotlib figure as NAME.png, NAME.svg and NAME.provenance.json; equal records give equal bytes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from spectrim.report import coverage, looks
from spectrim.report.looks import Marker
from spectrim.report.table import provenance_bytes
from spectrim.tools import files

Share = Literal["none", "y", "all"]


@dataclass(frozen=True)
class Curve:
    """How a curve or a set of points is drawn, and its name in the legend. ``looks`` has the looks of methods."""

    name: str
    colour: str
    marker: Marker


DENSE = Curve("dense", *looks.DENSE)
# By algorithm and mode.
SERIES = {
    ("truncation", ""): Curve("truncation", *looks.TRUNCATION),
    ("lossless", "one-shot"): Curve("lossless, one-shot", *looks.LOSSLESS),
    ("lossless", "verified"): Curve("lossless, verified", *looks.VERIFIED_LOSSLESS),
    ("compact", "one-shot"): Curve("compact, one-shot", *looks.COMPACT),
    ("compact", "verified"): Curve("compact, verified", *looks.VERIFIED_COMPACT),
}
FIRST, SECOND = "#0072B2", "#D55E00"  # of two quantities of the same runs
WIDTH = 7.0  # inches; so wide a page shows a figure unscaled, with letters of 9 pt
LETTERS = 88  # characters of a title that fit on one line of this width
# The type is Any because matplotlib types each key of its settings separately.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "spectrim",
    "svg.fonttype": "path",
}


def _style() -> Any:
    # The figures must not depend on the user's own matplotlib settings.
    return dict(matplotlib.rcParamsDefault) | {"backend": "agg"} | STYLE


@contextmanager
def panels(
    count: int, columns: int, height: float, title: str, share: Share = "none"
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of ``WIDTH`` inches and its ``count`` panels, each ``height`` inches high; needs no display.

    ``title``: the one message of the figure.
    ``share``: ``"y"`` for one vertical axis in all panels, ``"all"`` for one of each kind.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    with matplotlib.rc_context(_style()):
        canvas = Figure(figsize=(WIDTH, rows * height), layout="constrained")
        canvas.suptitle(fill(title.replace(" %", "\u00a0%"), LETTERS), x=0.01, ha="left")
        axes = list(canvas.subplots(rows, columns, squeeze=False, sharey=share != "none", sharex=share == "all").flat)
        for unused in axes[count:]:
            unused.set_axis_off()
        for index, axis in enumerate(axes[:count]):
            _label_outer(axis, share, left=index % columns == 0, lowest=index + columns >= count)
        yield canvas, axes[:count]


def _label_outer(axis: Axes, share: Share, left: bool, lowest: bool) -> None:
    """Leave the labels of a shared axis to the outer panels. The lowest panel of a column is an outer one."""
    if share != "none":
        axis.yaxis.label.set_visible(left)
        axis.tick_params(labelleft=left)
    if share == "all":
        axis.xaxis.label.set_visible(lowest)
        axis.tick_params(labelbottom=lowest)


def parts(name: str, rows: pd.DataFrame, main: "pd.Series[bool]") -> list[tuple[str, pd.DataFrame]]:
    """Return the name and the rows of a figure and of its appendix, each only if it has rows.

    ``main``: which rows the figure shows; the appendix shows the others.
    """
    both = [(name, rows[main]), (f"{name}_appendix", rows[~main])]
    return [(part, own) for part, own in both if len(own)]


def losses(axes: Sequence[Axes], label: str = "test loss") -> None:
    """Make the loss axis of panels that share it logarithmic, and label it. Call it after everything is drawn."""
    low, high = (choose(axis.dataLim.intervaly[at] for axis in axes) for at, choose in enumerate((min, max)))
    steps = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100)
    for axis in axes:
        axis.set(yscale="log", ylabel=f"{label} (nats)", ylim=(0.85 * low, 1.15 * high))
        axis.set_yticks([step for step in steps if 0.85 * low <= step <= 1.15 * high])
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def bars(rows: pd.DataFrame, value: str, lowest: float) -> pd.DataFrame:
    """Return the lengths of error bars below and above the values of a column: their standard deviation.

    A single run has no bar. A bar ends at ``lowest``, since a loss that varies much would reach below zero.
    """
    spread = rows[f"{value}_std"].fillna(0.0)
    return pd.DataFrame([spread.clip(upper=(rows[value] - lowest).clip(lower=0.0)), spread])


def save(figure: Figure, name: str, folder: Path, origin: Mapping[str, Any]) -> list[Path]:
    """Write a figure under ``folder/figures``, either all files or none. Return their paths.

    A figure that lacks runs says so in its corner. Call this inside ``panels``, because it needs that style. The files
    hold no date and no program version, so equal records give equal bytes.
    """
    if missing := coverage.note(origin):
        figure.supxlabel(missing, x=0.99, ha="right", color=SECOND)
    place = folder / "figures" / name
    contents = {
        place.with_name(f"{name}.png"): _bytes(figure, "png", {"Software": None}),
        place.with_name(f"{name}.svg"): _bytes(figure, "svg", {"Date": None, "Creator": None}),
        place.with_name(f"{name}.provenance.json"): provenance_bytes(name, origin),
    }
    files.write(contents)
    return list(contents)


def _bytes(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    return stream.getvalue()


def loss_panel(axis: Axes, rows: pd.DataFrame, model: str, share: str, label: str) -> None:
    """Draw one model's test loss against the column ``share``.

    The dense network is a horizontal line and truncation is a curve. Each selector is a set of points with their
    standard deviation over the seeds. A bar ends at nine tenths of the dense network's loss.

    ``label``: label of the horizontal axis.
    """
    dense = float(rows.loc[rows["algorithm"] == "dense", "test_loss"].iloc[0])
    axis.axhline(dense, color=DENSE.colour, linewidth=1, label=DENSE.name)
    for (algorithm, mode), curve in SERIES.items():
        own = rows[(rows["algorithm"] == algorithm) & (rows["mode"] == mode)].sort_values(share)
        if own.empty:
            continue
        axis.errorbar(
            100 * own[share],
            own["test_loss"],
            yerr=bars(own, "test_loss", 0.9 * dense),
            color=curve.colour,
            marker=curve.marker,
            linestyle="-" if algorithm == "truncation" else "none",
            linewidth=1.2,
            markersize=5,
            capsize=2,
            label=curve.name,
        )
    axis.set(title=model, xlabel=label, xlim=(-5, 105))  # a marker at 0 or 100 % is whole


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """Draw one legend below all panels that names each line once, in ``columns`` columns.

    It shows a line without its error bars, which would hide the marker. A long name is broken into lines.
    """
    handles = {
        fill(text, LETTERS // columns): handle[0] if isinstance(handle, ErrorbarContainer) else handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the name of each curve to the left of its left end, in its colour.

    ``ends``: x, y, name and colour of each curve. Names that would overlap are moved apart, the highest stays.
    """
    low, high = axis.get_ylim()
    gap = (high - low) * 0.06
    free = high
    for x, y, name, colour in sorted(ends, key=lambda end: -end[1]):
        free = min(y, free)
        axis.annotate(
            name, (x, free), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", color=colour
        )
        free -= gap
