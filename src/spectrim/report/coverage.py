"""Check that a table is built from the record of every run that its grids ask for, and from no other."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.provenance import ROOT

# A row per run: its experiment and signature, its grid, and the tables and figures that show it. To compose all grids
# takes minutes, so `make index` writes this file and `make check-records` holds it to the grids.
INDEX = ROOT / "results" / "index" / "cells.csv"
COLUMNS = ("experiment", "signature", "grid", "shown_in")


@dataclass(frozen=True)
class Coverage:
    """How many runs the grids of a table ask for, and how many of them have no record."""

    expected: int
    missing: int

    @property
    def note(self) -> str:
        """The number of missing runs, for a reader; empty if there is none."""
        return f"{self.missing} of {self.expected} runs missing." if self.missing else ""


def of(name: str, experiment: str, folder: Path, index: Path) -> Coverage:
    """Return how the records in ``folder`` meet the grids of the table or figure ``name``.

    A name that the index does not know expects nothing, such as a script of your own.

    ``experiment``: the experiment that the table reads first.
    ``index``: the file of the cells, as ``INDEX``.
    Raises ``UserError`` where a record of the experiment belongs to no grid of the table.
    """
    cells = [row for row in read(index) if name in row["shown_in"].split()]
    paths = [records.path_of(folder, row["experiment"], row["signature"]) for row in cells]
    if cells:
        own = records.path_of(folder, experiment, "any").parent
        stray = sorted(set(filter(records.is_record, own.glob("*.json"))) - set(paths))
        if stray:
            raise UserError(
                f"{len(stray)} records of {experiment} belong to no grid of {name}, such as {stray[0]}: move them to "
                "another experiment, or run `make index` if a grid or a checkpoint has changed"
            )
    return Coverage(len(paths), sum(not path.exists() for path in paths))


def read(index: Path) -> list[dict[str, str]]:
    """Return the rows of the index; none if it does not exist. Raises ``UserError`` where it cannot be read."""
    if not index.is_file():
        return []
    try:
        with index.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {index}: {error}; run `make index`") from error
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise UserError(f"{index} needs the columns {', '.join(COLUMNS)}: run `make index`")
    return rows


def note(origin: Mapping[str, Any]) -> str:
    """Return the note on missing runs for a provenance from ``command.origin``; empty if none is missing."""
    found = origin.get("coverage")
    return Coverage(**found).note if found else ""
