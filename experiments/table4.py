"""Table 4: one selector with several decompositions of the same networks, stored as plain or pivoted factors."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from spectrim.report import averages, claims, command, frame
from spectrim.report.command import Options
from spectrim.report.compare import Word
from spectrim.report.table import Column, Table, save

DECOMPOSITIONS = {
    "svd_channel": "SVD, channel view",
    "svd_spatial": "SVD, spatial view",
    "best_view": "SVD, better view of each layer",
    "whitened_channel": "whitened SVD, channel view",
    "whitened_spatial": "whitened SVD, spatial view",
    "whitened_best_view": "whitened SVD, better view of each layer",
    "tucker2": "Tucker-2",
}
FORMS = ["plain", "pivoted"]
VALUES = (
    "test_loss",
    "change_test_loss",
    "test_accuracy",
    "change_test_accuracy_pp",
    "params_kept",
    "macs_kept",
    "predicted_change",
    "change_calibration_loss",
)
COLUMNS = (
    Column("model", "model"),
    Column("variant", "selector"),
    Column("method", "decomposition"),
    Column("factors", "factors"),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("predicted_change", "predicted Δ loss", 4, signed=True),
    Column("change_calibration_loss", "measured Δ calibration loss", 4, signed=True),
    Column("n", "n"),
    Column("verdict", "test loss not above dense"),
)
PAPER = ("variant", "method", "factors", "params_kept", "test_accuracy", "change_test_loss")
NOTES = (
    averages.NOTE,
    "Δ = compressed − dense. Params and MACs kept count the whole model. Predicted is the first-order change of the "
    "calibration loss, summed over the layers. There is no fine-tuning, and no selector sees the test split. BatchNorm "
    "statistics stay those of the dense network.",
    "A selector of S1 needs only the weight change at each rank, so it takes any decomposition. Truncation keeps the "
    "same share of every layer whatever the loss is. It shows the worth of the decomposition alone.",
    "Pivoted factors of rank k store k rows of the weight and the coefficients of the others in them. The same size "
    "then holds a higher rank, and a convolution saves no multiplication: params and MACs stand side by side.",
    "S1: Zhang et al., Lossless Model Compression via Joint Low-Rank Factorization Optimization, arXiv 2412.06867.",
)


def build(options: Options) -> list[Path]:
    """Build Table 4."""
    found = command.load(options)
    runs = command.runs(options, found, frame.METHODS)
    row = ["model", "variant", "decomposer", "factors"]
    one = "{variant} with {decomposer} on {model}, {factors} factors"
    frame.require_one_setting(runs, row, one, "Table 4 has one row")
    order = list(DECOMPOSITIONS)
    runs = runs.assign(
        method=runs["decomposer"].map(lambda name: DECOMPOSITIONS.get(name, name)),
        place=runs["decomposer"].map(lambda name: order.index(name) if name in order else len(order)),
        form=runs["factors"].map(FORMS.index),
    )
    order_of_rows = ["model", "variant", "form", "place", "first_signature"]
    rows = averages.with_dense(runs.sort_values(order_of_rows, kind="stable"), VALUES, ["factors"])
    rows["verdict"] = claims.loss_verdicts(rows)
    caption = f"One selector with several decompositions, without fine-tuning, on {frame.data_of(rows)}"
    notes = [*NOTES, *_summary(rows)]
    table = Table(options.name, rows, COLUMNS, caption, notes, group="model", hidden=frame.KEYS)
    return save(
        [table, table.paper(PAPER, notes=[averages.seeds_note(rows)])], options.out, command.origin(options, found)
    )


def _summary(rows: pd.DataFrame) -> list[str]:
    """Return, for each selector that promises the loss, the number of decompositions with which it kept it."""
    said = []
    for (model, variant), own in rows[rows["verdict"].notna()].groupby(["model", "variant"], sort=False):
        kept = sum(verdict.word is Word.HOLDS for verdict in own["verdict"])
        said.append(f"{model}, {variant}: test loss not above dense with {kept} of {len(own)} decompositions.")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table4", "table4", arguments)


if __name__ == "__main__":
    sys.exit(main())
