"""Figure 3: test loss against rank below break-even, for a DenseNet and a VGG, beside lossless and compact."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spectrim.records import records
from spectrim.report import averages, claims, command, compare, figure, figure_data, frame, table
from spectrim.report.command import Options
from spectrim.report.table import number

# The points of lossless and compact come from the records of Table 2, where there are some.
OURS = "table2"
# A network that keeps more than this share of its parameters is practically the original, so its loss decides nothing.
NOTICEABLE = 0.999
PAPER = ("model", "method", "layers_kept", "test_loss", "change_test_loss", "n")
VALUES = ("layers_kept", "test_loss", "change_test_loss", "params_kept")


def build(options: Options) -> list[Path]:
    """Draw one panel per model of the sweep, and build the table of the same numbers."""
    found = command.load(options)
    models = list(dict.fromkeys(command.runs(options, found, ["truncation"])["model"]))
    beside = (
        [one for one in records.read_all(options.records, OURS) if _selected(one, models)] if options.default else []
    )
    used = [*found, *beside]
    rows = averages.with_dense(command.runs(options, used, frame.METHODS), VALUES)
    origin = command.origin(options, used)
    with figure.panels(len(models), 2, 2.6, _title(rows), share="all") as (canvas, axes):
        for model, axis in zip(models, axes, strict=True):
            own = rows[rows["model"] == model]
            figure.loss_panel(axis, own, model, "layers_kept", "rank / break-even rank (%)")
        figure.losses(axes)
        figure.legend(canvas, axes)
        pictures = figure.save(canvas, options.name, options.out, origin)
    notes = [
        "Rank / break-even rank is the share of parameters that the factorable layers keep. Above 100 % a factored "
        "layer would be larger than the dense one. A layer that stays dense counts 100 %.",
        *(_note(rows[rows["model"] == model], model) for model in models),
    ]
    caption = "Numbers of Figure 3: loss against rank"
    shown = figure_data.table(options, rows, VALUES, caption, notes, ("densenet", "vgg"))
    return pictures + table.save([shown, shown.paper(PAPER)], options.out, origin)


def _title(rows: pd.DataFrame) -> str:
    """Return the message: how often truncation, lossless and compact stay below the original's loss."""
    cut, ours = rows[rows["algorithm"] == "truncation"], _factored(rows)
    said = f"Below break-even rank, truncation lowers the test loss at {_below(cut)} of {len(cut)} ranks"
    return f"{said}, lossless and compact selection in {_below(ours)} of {len(ours)} settings"


def _factored(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of lossless and compact selection that removed a noticeable part."""
    return rows[rows["algorithm"].isin(claims.PROMISING) & (rows["params_kept"] < NOTICEABLE)]


def _below(rows: pd.DataFrame) -> int:
    return int((rows["change_test_loss"] < 0).sum())


def _selected(record: records.Record, models: list[str]) -> bool:
    return frame.model_of(record) in models and records.algorithm_of(record) in claims.PROMISING


def _note(rows: pd.DataFrame, model: str) -> str:
    """Judge S1's claim for one model: below break-even the selectors' loss lies below the original's."""
    ours, cut = _factored(rows), rows[rows["algorithm"] == "truncation"]
    sweep = f"truncation is below the original at {_below(cut)} of {len(cut)} ranks"
    if ours.empty:
        return f"{model}: S1 Figure 3 not comparable: no lossless or compact run that removed 0.1 %; {sweep}."
    word = compare.counted(_below(ours), len(ours))
    said = "; ".join(f"{row['method']} {number(row['change_test_loss'], 4, True)}" for _, row in ours.iterrows())
    return f"{model}: S1 Figure 3 (loss below the original's under 0 < rank < break-even) {word}: {said}; {sweep}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure3", "figure3", arguments)


if __name__ == "__main__":
    sys.exit(main())
