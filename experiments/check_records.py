"""Whether records and grids agree: ``make check-records``, or names of grids on stdin, one a line.

Every cell of every grid is composed and signed; nothing is run. A cell without a record and a record without a cell are
named, and either makes the exit status 1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.initialize import initialize_config_dir
from tqdm import tqdm

from spectrim.cli.run import scientific
from spectrim.records import records
from spectrim.runs import configuration
from spectrim.tools import digests

digest = cache(digests.of_file)


def cells(grid: str) -> Iterator[list[str]]:
    """The overrides of each run of a grid, as Hydra's sweeper gives them."""
    params = compose("config", [f"experiment={grid}"], return_hydra_config=True).hydra.sweeper.params or {}
    parser = OverridesParser.create()
    swept = [parser.parse_override(f"{key}={values}") for key, values in params.items()]
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in swept
    ]
    for chosen in product(*choices):
        yield [f"experiment={grid}", *chosen]


def cell_of(overrides: list[str]) -> tuple[str, str]:
    """Experiment and signature of one run."""
    cfg = compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    checkpoint = None if cfg.checkpoint is None else digest(Path(cfg.checkpoint))
    return cfg.name, records.signature(records.identity(scientific(cfg) | {"checkpoint": checkpoint}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the script; the exit status."""
    parser = argparse.ArgumentParser(description="Whether records and grids agree; grids are named on stdin.")
    parser.add_argument("--records", type=Path, default=Path("results/records"), help="folder of records")
    folder = parser.parse_args(arguments).records
    met: dict[tuple[str, str], str] = {}
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        for grid in tqdm(sys.stdin.read().split(), "grids", unit="grid", leave=False, disable=None):
            met |= {cell_of(overrides): grid for overrides in cells(grid)}
    there = {(str(path.parent.relative_to(folder)), path.stem) for path in folder.rglob("*.json")}
    for name, signature in sorted(met.keys() - there):
        print(f"{name}/{signature}: a cell of {met[name, signature]} that has no record")
    for name, signature in sorted(there - met.keys()):
        print(f"{name}/{signature}: a record that is of no grid")
    print(f"{len(met)} cells, {len(there)} records, {len(met.keys() & there)} of both")
    return int(met.keys() != there)


if __name__ == "__main__":
    sys.exit(main())
