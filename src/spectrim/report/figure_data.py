"""Build the table of the numbers that a figure shows."""

from collections.abc import Sequence

import pandas as pd

from spectrim.report import frame
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, pick

COLUMNS = (
    Column("layers_kept", "rank / break-even rank %", 1, scale=100),
    Column("relative_error", "‖δ‖/‖W‖, rms over layers", 4),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("params_kept", "params kept %", 1, scale=100),
)


def table(
    options: Options,
    rows: pd.DataFrame,
    values: Sequence[str],
    caption: str,
    notes: Sequence[str],
    families: Sequence[str] = frame.FAMILIES,
) -> Table:
    """Build a table with the columns model, method, ``values`` and n.

    ``values``: keys of ``COLUMNS``.
    ``families``: a final note lists those of them that have no model in ``rows``.
    """
    columns = (
        Column("model", "model"),
        Column("method", "method"),
        *pick(COLUMNS, values),
        Column("n", "n (training × calibration seeds)"),
    )
    caption = f"{caption} on {frame.data_of(rows)}"
    notes = [*notes, *frame.missing(rows["model"], families)]
    return Table(options.name, rows, columns, caption, notes, group="model", hidden=frame.KEYS)
