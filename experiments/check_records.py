"""Check that records and grids agree: ``make check-records``, or names of grids on stdin, one a line.

Every cell of every grid is composed and signed; nothing is run. A cell without a record and a record without a cell are
named, and either makes the exit status 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.initialize import initialize_config_dir
from tqdm import tqdm

from spectrim.records.records import is_record
from spectrim.runs import configuration
from spectrim.runs.cells import cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare cells with records. Return the exit status."""
    parser = argparse.ArgumentParser(description="Check that records and grids agree; grids are named on stdin.")
    parser.add_argument("--records", type=Path, default=Path("results/records"), help="folder of records")
    folder = parser.parse_args(arguments).records
    met: dict[tuple[str, str], str] = {}
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        for grid in tqdm(sys.stdin.read().split(), "grids", unit="grid", leave=False, disable=None):
            for cell in cells(grid):
                if cell.signature is None:
                    print(f"error: {grid} needs the checkpoint {cell.checkpoint}; see `make train`", file=sys.stderr)
                    return 1
                met[cell.experiment, cell.signature] = grid
    files = filter(is_record, folder.rglob("*.json"))
    there = {(str(path.parent.relative_to(folder)), path.stem) for path in files}
    for name, signature in sorted(met.keys() - there):
        print(f"{name}/{signature}: a cell of {met[name, signature]} that has no record")
    for name, signature in sorted(there - met.keys()):
        print(f"{name}/{signature}: a record that is of no grid")
    print(f"{len(met)} cells, {len(there)} records, {len(met.keys() & there)} of both")
    return int(met.keys() != there)


if __name__ == "__main__":
    sys.exit(main())
