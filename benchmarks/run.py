"""Run the benchmarks, all or some of them: ``python benchmarks/run.py [curves speed …] [--quick]``.

Each writes NAME.csv, NAME.md and NAME.provenance.json and prints its table and its targets. Only ratios within one run
mean anything on another machine. A missed target is printed as missed; only a crash gives an exit status other than 0.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import curves
import decoders
import latency
import memory
import pivoted
import quantised
import refit
import ridge
import selection
import sizes
import speed
import sweep
import torch
import variants
from measure import Outcome

from spectrim.errors import UserError
from spectrim.records.provenance import provenance
from spectrim.report.table import provenance_bytes
from spectrim.tools import files

BENCHMARKS: dict[str, Callable[[bool], Outcome]] = {
    "curves": curves.benchmark,
    "selection": selection.benchmark,
    "sizes": sizes.benchmark,
    "sweep": sweep.benchmark,
    "latency": latency.benchmark,
    "pivoted": pivoted.benchmark,
    "quantised": quantised.benchmark,
    "refit": refit.benchmark,
    "ridge": ridge.benchmark,
    "variants": variants.benchmark,
    "speed": speed.benchmark,
    "memory": memory.benchmark,
    "decoders": decoders.benchmark,
}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the benchmarks, as ``make bench`` does."""
    options = _options()
    folder = options.folder or ROOT / ("build/benchmarks" if options.quick else "results/benchmarks")
    for name in options.names or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        busy = os.getloadavg()[0]
        outcome = BENCHMARKS[name](options.quick)
        _write(name, outcome, folder, options.quick, busy)
        print(outcome.table.markdown(), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the benchmarks, all or those named.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? The numbers mean nothing")
    parser.add_argument("--folder", type=Path, help="default: results/benchmarks, with --quick build/benchmarks")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(BENCHMARKS)}")
    return options


def _write(name: str, outcome: Outcome, folder: Path, quick: bool, busy: float) -> None:
    command = f"python benchmarks/run.py {name}{' --quick' if quick else ''}"
    origin = {
        **provenance(command, outcome.data, None),
        "settings": outcome.settings,
        "targets": [{**asdict(target), "met": target.met} for target in outcome.targets],
        "threads": torch.get_num_threads(),
        "load_average_before": busy,  # above about 0.5 something else ran beside
    }
    files.write(
        {
            folder / f"{name}.csv": outcome.table.csv().encode(),
            folder / f"{name}.md": outcome.table.markdown().encode(),
            folder / f"{name}.provenance.json": provenance_bytes(name, origin),
        }
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks: {error}")
