"""Save a matplotlib figure as NAME.png, NAME.svg and NAME.provenance.json; equal records give equal bytes."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from spectrim.report.table import provenance_bytes
from spectrim.tools import files


@dataclass(frozen=True)
class Series:
    """How the runs of one algorithm and mode look in every figure, and their name in the legend."""

    algorithm: str
    mode: str
    label: str
    colour: str
    marker: str


# The palette of Okabe and Ito is safe for all common types of colour blindness. Each colour also has its own marker.
DENSE = Series("dense", "", "dense", "#000000", "_")
SERIES = (
    Series("truncation", "", "truncation", "#E69F00", "s"),
    Series("lossless", "one-shot", "lossless, one-shot", "#56B4E9", "^"),
    Series("lossless", "verified", "lossless, verified", "#0072B2", "v"),
    Series("compact", "one-shot", "compact, one-shot", "#CC79A7", "D"),
    Series("compact", "verified", "compact, verified", "#009E73", "o"),
)
FIRST, SECOND = "#0072B2", "#D55E00"  # of two quantities of the same runs
# The type is Any because matplotlib types each key of its settings separately.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
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
def panels(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of ``rows × columns`` panels, each ``width × height`` inches, and its axes; needs no display."""
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def losses(axis: Axes, label: str = "test loss") -> None:
    """Label the loss axis after everything is drawn. Make it logarithmic if the losses span a factor of 2 or more."""
    low, high = axis.dataLim.intervaly
    if low <= 0 or high < 2 * low:
        axis.set_ylabel(f"{label} (nats)")
        return
    axis.set(yscale="log", ylabel=f"{label} (nats, log scale)")
    low, high = axis.get_ylim()
    steps = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)
    axis.set_yticks([step for step in steps if low <= step <= high])
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, name: str, folder: Path, origin: Mapping[str, Any]) -> list[Path]:
    """Write a figure under ``folder/figures``, either all files or none. Return their paths.

    Call it inside ``panels``, because it needs that style. The files hold no date and no program version, so equal
    records give equal bytes.
    """
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


def loss_panel(axis: Axes, rows: pd.DataFrame, model: str, share: str, label: str, line: str) -> None:
    """Draw one model's test loss against the column ``share``.

    The dense network is a horizontal line and truncation is a curve. Each selector is a set of points with their
    standard deviation over the seeds.

    ``label``: label of the horizontal axis.
    ``line``: line style of the truncation curve.
    """
    dense = float(rows.loc[rows["algorithm"] == "dense", "test_loss"].iloc[0])
    axis.axhline(dense, color=DENSE.colour, linewidth=1, label=DENSE.label)
    for series in SERIES:
        own = rows[(rows["algorithm"] == series.algorithm) & (rows["mode"] == series.mode)].sort_values(share)
        if own.empty:
            continue
        axis.errorbar(
            100 * own[share],
            own["test_loss"],
            yerr=own["test_loss_std"].fillna(0.0),
            color=series.colour,
            marker=series.marker,
            linestyle=line if series.algorithm == "truncation" else "none",
            linewidth=1.2 if line == "-" else 1,
            markersize=5,
            capsize=2,
            label=series.label,
        )
    axis.set(title=model, xlabel=label, xlim=(0, 105))
    losses(axis)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend below all panels that names each line once."""
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
