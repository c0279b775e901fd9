"""Check that records and grids agree: ``make check-records``, or names of grids or of their folders on stdin.

Every cell of every grid is composed and signed; nothing is run. A cell without a record and a record without a cell are
named, and either makes the exit status 1. So does an index of the cells, which the tables read, that is out of date;
``--write`` writes it anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grids
from hydra.initialize import initialize_config_dir
from tqdm import tqdm

from spectrim.errors import UserError
from spectrim.records.records import is_record
from spectrim.report import coverage
from spectrim.runs import configuration
from spectrim.runs.cells import cells
from spectrim.runs.read_once import read_once
from spectrim.tools import files


def named() -> list[str]:
    """Return the grids that stdin names. Raises ``UserError`` where it names none, or one that is unknown."""
    names = [] if sys.stdin.isatty() else sys.stdin.read().split()
    if not names:
        raise UserError("stdin names no grid: run `make check-records`, or `echo GRID | python check_records.py`")
    return [grid for name in names for grid in configuration.grids_called(name)]


def indexed(met: dict[tuple[str, str], str]) -> str:
    """Return the index of the cells as CSV. ``met``: the grid of each cell."""
    shown: dict[str, list[str]] = {}
    for name in grids.read():
        for grid in grids.grids(name):
            shown.setdefault(grid, []).append(name)
    lines = [",".join([*cell, grid, " ".join(shown.get(grid, []))]) for cell, grid in sorted(met.items())]
    return "\n".join([",".join(coverage.COLUMNS), *lines]) + "\n"


def signed(names: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return the grid of each cell, by folder and signature of its record.

    Raises one of ``configuration.MISTAKES``, such as ``UserError`` where a checkpoint is missing.
    """
    met: dict[tuple[str, str], str] = {}
    with initialize_config_dir(configuration.CONF, version_base="1.3"), read_once():
        for grid in tqdm(names, "grids", unit="grid", leave=False, disable=None):
            for cell in cells(grid):
                if cell.signature is None:
                    raise UserError(f"{grid} needs the checkpoint {cell.checkpoint}; see `make train`")
                met[cell.experiment, cell.signature] = grid
    return met


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare cells with records. Return the exit status."""
    parser = argparse.ArgumentParser(description="Check that records and grids agree; grids are named on stdin.")
    parser.add_argument("--records", type=Path, default=Path("results/records"), help="folder of records")
    parser.add_argument("--write", action="store_true", help="write the index of the cells, which the tables read")
    options = parser.parse_args(arguments)
    folder = options.records
    try:
        met = signed(named())
    except configuration.MISTAKES as error:
        print(f"error: {configuration.innermost(error)}", file=sys.stderr)
        return 1
    if options.write:
        files.write({coverage.INDEX: indexed(met).encode()})
    paths = filter(is_record, folder.rglob("*.json"))
    there = {(str(path.parent.relative_to(folder)), path.stem) for path in paths}
    for name, signature in sorted(met.keys() - there):
        print(f"{name}/{signature}: a cell of {met[name, signature]} that has no record")
    for name, signature in sorted(there - met.keys()):
        print(f"{name}/{signature}: a record that is of no grid")
    print(f"{len(met)} cells, {len(there)} records, {len(met.keys() & there)} of both")
    rows = coverage.read(coverage.INDEX)
    current = {(row["experiment"], row["signature"]) for row in rows if row["grid"] in met.values()}
    if current != met.keys():
        print(f"{coverage.INDEX.name} is out of date: run `make index`")
    return int(met.keys() != there or current != met.keys())


if __name__ == "__main__":
    sys.exit(main())
