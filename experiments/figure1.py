"""Figure 1: test loss against parameters kept for truncation, lossless and compact selection (records of Table 2)."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spectrim.report import averages, claims, command, compare, figure, figure_data, frame, table
from spectrim.report.command import Options
from spectrim.report.table import number

NEARLY = 0.01  # nats above the dense network's test loss
VALUES = ("test_loss", "change_test_loss", "params_kept")


def build(options: Options) -> list[Path]:
    """Draw loss against parameters kept, one panel per model, and build the table of the same numbers."""
    found = command.load(options)
    rows = averages.with_dense(command.runs(options, found, frame.METHODS), VALUES)
    origin = command.origin(options, found)
    models = list(dict.fromkeys(rows["model"]))
    pictures: list[Path] = []
    for name, shown in figure.parts(options.name, rows, rows["model"].isin(models[:6])):
        nets = shown.groupby("model", sort=False)
        with figure.panels(len(nets), 3, 2.1, _title(rows), share="all") as (canvas, axes):
            for (model, own), axis in zip(nets, axes, strict=True):
                figure.loss_panel(axis, own, str(model), "params_kept", "parameters kept (%)")
            figure.losses(axes)
            figure.legend(canvas, axes)
            pictures += figure.save(canvas, name, options.out, origin)
    caption = "Numbers of Figure 1: test loss without fine-tuning"
    notes = ["Mean ± standard deviation (ddof = 1).", *(_note(rows[rows["model"] == model], model) for model in models)]
    beside = figure_data.table(options, rows, VALUES, caption, notes)
    return pictures + table.save([beside], options.out, origin)


def _title(rows: pd.DataFrame) -> str:
    """Return the message: the largest reduction at nearly the dense loss, for the model where it is largest."""
    kept = rows[rows["algorithm"].isin(claims.PROMISING) & (rows["change_test_loss"] <= NEARLY)]
    if kept.empty:
        return f"No lossless or compact selection stays within {NEARLY:g} nats of the dense network's test loss"
    smallest = kept.groupby("model", sort=False)["params_kept"].min()
    best = str(smallest.idxmin())
    others = smallest.drop(best)
    said = f"lossless and compact selection remove up to {100 * (1 - smallest.min()):.0f} % of {best}"
    rest = f", at most {100 * (1 - others.min()):.0f} % of the others" if len(others) else ""
    return f"Within {NEARLY:g} nats of the dense test loss, {said}{rest}"


def _note(rows: pd.DataFrame, model: str) -> str:
    """Judge S1's claim for one model: the selectors' loss lies below truncation's at the nearest size."""
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
