"""Figure 1: test loss of the original, of truncation, lossless and compact, per model (records of Table 2)."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spectrim.report import claims, command, compare, figure, figure_data, frame, table
from spectrim.report.command import Options
from spectrim.report.table import number

VALUES = ("test_loss", "change_test_loss", "params_kept")


def build(options: Options) -> list[Path]:
    """Loss against parameters kept, a panel per model, and the table of what is drawn."""
    found = command.load(options)
    rows = frame.with_dense(command.runs(options, found, figure_data.METHODS), VALUES)
    origin = command.origin(options, found)
    models = list(dict.fromkeys(rows["model"]))
    columns = 2 if len(models) == 4 else min(3, len(models))
    with figure.panels(-(-len(models) // columns), columns, 3.2, 2.9) as (canvas, axes):
        for model, axis in zip(models, axes, strict=False):
            figure.loss_panel(axis, rows[rows["model"] == model], model, "params_kept", "parameters kept (%)", "--")
        for axis in axes[len(models) :]:
            axis.set_axis_off()
        figure.legend(canvas, axes)
        pictures = figure.save(canvas, options.name, options.out, origin)
    caption = "What Figure 1 shows: test loss without fine-tuning"
    notes = ["Mean ± standard deviation (ddof = 1).", *(_note(rows[rows["model"] == model], model) for model in models)]
    shown = figure_data.table(options, rows, VALUES, caption, notes)
    return pictures + table.save([shown], options.out, origin)


def _note(rows: pd.DataFrame, model: str) -> str:
    """S1's claim, for one model: the selectors' loss lies below truncation's, each compared at the nearest size."""
    cut = rows[rows["algorithm"] == "truncation"]
    ours = rows[rows["algorithm"].isin(claims.PROMISING)]
    if cut.empty or ours.empty:
        return f"{model}: S1 Figure 1 (our loss below truncation's) not comparable: one of the two was not run."
    said, below = [], 0
    for _, row in ours.iterrows():
        near = cut.iloc[int((cut["params_kept"] - row["params_kept"]).abs().argmin())]
        below += bool(row["test_loss"] < near["test_loss"])
        shares = f"{100 * row['params_kept']:.0f} against {100 * near['params_kept']:.0f} % kept"
        said.append(f"{row['method']} {number(row['test_loss'] - near['test_loss'], 3, True)} ({shares})")
    word = compare.counted(below, len(ours))
    return f"{model}: S1 Figure 1 (loss below that of truncation, at the nearest size run) {word}: {'; '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure1", "table2", arguments)


if __name__ == "__main__":
    sys.exit(main())
