"""Figure 2: weight error and test loss at four ranks, to see whether the lowest error is the lowest loss."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from spectrim.report import averages, command, compare, figure, figure_data, table
from spectrim.report.command import Options

PAPER = ("model", "method", "layers_kept", "relative_error", "test_loss", "n")
VALUES = ("layers_kept", "relative_error", "test_loss", "change_test_loss", "params_kept")


def build(options: Options) -> list[Path]:
    """Draw error above and loss below, one column per model, and build the table of the same numbers."""
    found = command.load(options)
    rows = averages.with_dense(command.runs(options, found, ["truncation"]), VALUES)
    origin = command.origin(options, found)
    models = list(dict.fromkeys(rows["model"]))
    pictures: list[Path] = []
    for name, shown in figure.parts(options.name, rows, rows["model"].isin(models[:3])):
        nets = shown.groupby("model", sort=False)
        with figure.panels(2 * len(nets), len(nets), 1.9, _title(rows, models)) as (canvas, axes):
            above, below = axes[: len(nets)], axes[len(nets) :]
            for (_, own), upper, lower in zip(nets, above, below, strict=True):
                _column(upper, lower, own)
            figure.losses(below)
            above[0].set_ylabel("weight error ‖δ‖/‖W‖")
            for axis in below[1:]:
                axis.set_ylabel("")
            figure.legend(canvas, axes, 4)
            pictures += figure.save(canvas, name, options.out, origin)
    notes = ["A ring in the figure marks the lowest value of a panel.", *(_note(rows, model) for model in models)]
    beside = figure_data.table(options, rows, VALUES, "Numbers of Figure 2: plain truncation", notes)
    return pictures + table.save([beside, beside.paper(PAPER)], options.out, origin)


def _title(rows: pd.DataFrame, models: Sequence[str]) -> str:
    """Return the message: in how many networks the rank of the lowest error is that of the lowest loss."""
    same = sum(_same_rank(rows[(rows["model"] == model) & (rows["algorithm"] != "dense")]) for model in models)
    return f"The rank with the lowest weight error also has the lowest loss in {same} of {len(models)} networks"


def _column(above: Axes, below: Axes, rows: pd.DataFrame) -> None:
    """Draw one model: the error and the loss over its ranks, a ring around the lowest, and the dense loss as a line."""
    cut = rows[rows["algorithm"] != "dense"].sort_values("layers_kept")
    dense = float(rows.loc[rows["algorithm"] == "dense", "test_loss"].iloc[0])
    share = 100 * cut["layers_kept"]
    for axis, key, colour, marker, label in (
        (above, "relative_error", figure.SECOND, "D", "weight error"),
        (below, "test_loss", figure.FIRST, "o", "test loss"),
    ):
        axis.plot(share, cut[key], color=colour, marker=marker, linewidth=1.2, markersize=5, label=label)
        lowest = int(cut[key].argmin())
        ring: Any = {"markersize": 12, "fillstyle": "none", "color": "#CC79A7", "linestyle": "none", "clip_on": False}
        axis.plot(share.iloc[lowest], cut[key].iloc[lowest], "o", label="lowest value", **ring)
        axis.margins(y=0.15)
        axis.set_xlim(-5, 105)  # as in Figure 3
    # The line is also drawn as points, because axhline does not count for the limits.
    below.plot(share, [dense] * len(share), linestyle="none")
    below.axhline(dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
    above.set_title(rows["model"].iloc[0])
    above.set_ylim(bottom=0)
    below.set_xlabel("rank / break-even rank (%)")


def _same_rank(cut: pd.DataFrame) -> bool:
    return bool(cut["relative_error"].argmin() == cut["test_loss"].argmin())


def _note(rows: pd.DataFrame, model: str) -> str:
    """Judge S1's claim for one model."""
    cut = rows[(rows["model"] == model) & (rows["algorithm"] != "dense")]
    if len(cut) < 2:
        return f"{model}: S1 Figure 2 not comparable: a single rank was run."
    error, loss = (cut["method"].iloc[int(cut[key].argmin())] for key in ("relative_error", "test_loss"))
    word = compare.judged(not _same_rank(cut))
    said = f"(the lowest error is not the lowest loss) {word}: error lowest at {error}, loss at {loss}"
    return f"{model}: S1 Figure 2 {said}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure2", "figure2", arguments)


if __name__ == "__main__":
    sys.exit(main())
