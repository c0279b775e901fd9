"""Figure 2: size of the weight error and loss at four ranks: is the lowest error the lowest loss?"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from spectrim.report import command, compare, figure, figure_data, frame, table
from spectrim.report.command import Options

VALUES = ("layers_kept", "relative_error", "test_loss", "change_test_loss", "params_kept")


def build(options: Options) -> list[Path]:
    """Error above, loss below, a column per model, and the table of what is drawn."""
    found = command.load(options)
    rows = frame.with_dense(command.runs(options, found, ["truncation"]), VALUES)
    origin = command.origin(options, found)
    models = list(dict.fromkeys(rows["model"]))
    with figure.panels(2, len(models), 2.7, 2.1) as (canvas, axes):
        for index, model in enumerate(models):
            _column(axes[index], axes[len(models) + index], rows[rows["model"] == model], first=index == 0)
        pictures = figure.save(canvas, options.name, options.out, origin)
    notes = ["Rings in the figure: the lowest value of a panel.", *(_note(rows, model) for model in models)]
    shown = figure_data.table(options, rows, VALUES, "What Figure 2 shows: plain truncation", notes)
    return pictures + table.save([shown], options.out, origin)


def _column(above: Axes, below: Axes, rows: pd.DataFrame, first: bool) -> None:
    """One model: the error and the loss over its ranks, the lowest of each ringed, dense loss as a line."""
    cut = rows[rows["algorithm"] != "dense"].sort_values("layers_kept")
    dense = float(rows.loc[rows["algorithm"] == "dense", "test_loss"].iloc[0])
    share = 100 * cut["layers_kept"]
    for axis, key, colour, marker in (
        (above, "relative_error", figure.SECOND, "D"),
        (below, "test_loss", figure.FIRST, "o"),
    ):
        axis.plot(share, cut[key], color=colour, marker=marker, linewidth=1.2, markersize=5)
        lowest = int(cut[key].argmin())
        axis.plot(share.iloc[lowest], cut[key].iloc[lowest], "o", markersize=12, fillstyle="none", color="black")
        axis.margins(y=0.15)
    # Drawn as points too, so that the line takes part in the limits.
    below.plot(share, [dense] * len(share), linestyle="none")
    below.axhline(dense, color=figure.DENSE.colour, linewidth=1)
    below.annotate("dense", (float(share.min()), dense), xytext=(0, 2), textcoords="offset points", fontsize=8)
    above.set_title(f"{rows['model'].iloc[0]}\nlowest error is {'' if _same_rank(cut) else 'not '}lowest loss")
    above.set_ylim(bottom=0)
    below.set_xlabel("rank / break-even rank (%)")
    figure.losses(below)
    if first:
        above.set_ylabel("‖δ‖/‖W‖ (rms over layers)")


def _same_rank(cut: pd.DataFrame) -> bool:
    return bool(cut["relative_error"].argmin() == cut["test_loss"].argmin())


def _note(rows: pd.DataFrame, model: str) -> str:
    """S1's claim for one model."""
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
