"""Run the architectures of torchvision, timm and transformers through spectrim, and write a table of what works.

``python benchmarks/zoo/zoo.py [PATTERN …]`` runs all architectures, or those whose names hold a pattern. Each has a
process of its own, so that a crash is a row. A row that is in the folder of finished rows is not run again.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import timm_nets
import torch
import torchvision_nets
import transformers_nets
from given import Architecture
from tqdm import tqdm
from trial import ABSENT, CRASHES, FAULTS, FORMS, SELECTORS, Row, tried

from spectrim.errors import first_line
from spectrim.records.provenance import provenance
from spectrim.report.table import Column, Table, provenance_bytes
from spectrim.tools import files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"torchvision": torchvision_nets, "timm": timm_nets, "transformers": transformers_nets}
COLUMNS = (
    Column("package", "package"),
    Column("name", "architecture"),
    Column("params", "parameters", 0),
    Column("dense_share", "stays dense %", 0, 100),
    *(Column(name, name) for name in (*SELECTORS, *FORMS)),
)
CAPTION = "Architectures as torchvision, timm and transformers release them, with random weights"
NOTES = (
    "A cell says *works*, *dense* (the selector keeps every layer as it is), *refused* (one line says why, below), "
    "*wrong* or *crashes*; the last two are faults of spectrim. A result works if the given model is unchanged, the "
    "outputs are finite, and the dense model with the products of the factors as its weights gives the same outputs.",
    "Sizes are small: few blocks and channels where the class lets one choose. Truncation and joint selection keep 80 %"
    " of the parameters of the whole model, compact what it finds. Stays dense: embeddings, norms, biases, matrices "
    "that are not factored. Loads, pt2 and ONNX are of the joint result, or else of another that is not dense: weights "
    "filled into a new model, and exports that give its outputs on the example.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return 1 where a row is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="part of PACKAGE/NAME (default: all)")
    parser.add_argument("--rows", type=Path, default=ROOT / "build/zoo", help="of finished rows (default: build/zoo)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after these; call again")
    parser.add_argument(
        "--patience", type=float, default=600, metavar="SECONDS", help="for one architecture (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="default: results/benchmarks, with a PATTERN build/zoo/table")
    options = parser.parse_args(arguments)
    parts = options.patterns or [""]
    chosen = [one for one in everything() if any(part in label(one) for part in parts)]
    if not chosen:
        parser.error(f"no architecture is called {' or '.join(options.patterns)}")
    rows, end = [], time.monotonic() + 60 * options.minutes
    for architecture in (bar := tqdm(chosen, file=sys.stderr, leave=False)):
        bar.set_description(label(architecture))
        row = found(architecture, options.rows)
        if row is None and time.monotonic() < end:
            row = run(architecture, options.rows, options.patience)
        rows += [] if row is None else [row]
    out = options.out or (options.rows / "table" if options.patterns else ROOT / "results/benchmarks")
    table = table_of(rows, len(chosen))
    origin = {**provenance("make zoo", "random numbers", None), "packages": {name: version(name) for name in PACKAGES}}
    files.write(
        {
            out / "zoo.csv": table.csv().encode(),
            out / "zoo.md": table.markdown().encode(),
            out / "zoo.provenance.json": provenance_bytes("zoo", origin),
        }
    )
    print(table.markdown())
    return int(any(word in FAULTS for row in rows for word in row.cells.values()))


def everything() -> list[Architecture]:
    """Return the architectures of all packages."""
    return [one for module in PACKAGES.values() for one in module.architectures()]


def label(architecture: Architecture) -> str:
    """Return PACKAGE/NAME."""
    return f"{architecture.package}/{architecture.name}"


def version(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def found(architecture: Architecture, folder: Path) -> Row | None:
    """Return the row of ``architecture`` in ``folder``; None where these versions have not made it."""
    path = _path(architecture, folder)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"versions": None}
    return Row(**kept["row"]) if kept["versions"] == _versions(architecture) else None


def run(architecture: Architecture, folder: Path, patience: float) -> Row:
    """Run ``architecture`` for ``patience`` seconds at most, and write its row to ``folder``."""
    versions = _versions(architecture)
    row = absent(architecture) if versions[architecture.package] == ABSENT else in_process(architecture, patience)
    content = json.dumps({"versions": versions, "row": asdict(row)}, indent=1).encode()
    files.write({_path(architecture, folder): content})
    return row


def _path(architecture: Architecture, folder: Path) -> Path:
    return folder / f"{architecture.package}-{architecture.name}.json"


def _versions(architecture: Architecture) -> dict[str, str]:
    return {name: version(name) for name in ("spectrim", "torch", architecture.package)}


def absent(architecture: Architecture) -> Row:
    """Return the row of an architecture whose package is not installed."""
    return Row(architecture.package, architecture.name, cells=dict.fromkeys(SELECTORS, ABSENT))


def in_process(architecture: Architecture, patience: float) -> Row:
    """Run one architecture in a process of its own. A process that is killed, or takes longer, is a crash."""
    fork = multiprocessing.get_context("fork")  # the packages are imported once
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(architecture, there))
    child.start()
    there.close()
    try:
        row: Row | None = here.recv() if here.poll(patience) else None
    except EOFError:
        row = None
    if row is None and child.is_alive():
        child.kill()
    child.join()
    reason = f"no answer in {patience:g} s" if child.exitcode == -9 else f"the process ended with {child.exitcode}"
    return row or broken(architecture, reason)


def broken(architecture: Architecture, reason: str) -> Row:
    """Return the row of an architecture that cannot be tried."""
    cells, reasons = dict.fromkeys(SELECTORS, CRASHES), dict.fromkeys(SELECTORS, reason)
    return Row(architecture.package, architecture.name, cells=cells, reasons=reasons)


def _child(architecture: Architecture, out: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        out.send(tried(architecture))
    except Exception as error:  # the model itself cannot be made
        out.send(broken(architecture, f"{type(error).__name__}: {first_line(error)}"))


def table_of(rows: Sequence[Row], count: int) -> Table:
    """Return the table, whose last notes are the reasons of all cells that do not work.

    ``count``: number of architectures, run or not.
    """
    data = pd.DataFrame([_line(row) for row in rows])
    said: dict[str, list[str]] = {}
    for row in rows:
        for trial, reason in row.reasons.items():
            said.setdefault(f"{row.cells[trial]}: {reason}", []).append(f"{row.name} ({trial})")
    reasons = [f"- {', '.join(where)}: {reason}" for reason, where in said.items()]
    return Table("zoo", data, COLUMNS, CAPTION, [_summary(rows, count), *NOTES, "\n".join(reasons)], group="package")


def _line(row: Row) -> dict[str, Any]:
    cells = {trial: row.cells.get(trial) for trial in (*SELECTORS, *FORMS)}
    reasons = "; ".join(f"{trial}: {reason}" for trial, reason in row.reasons.items())
    head = {key: getattr(row, key) for key in ("package", "name", "params", "dense_share")}
    return {**head, **cells, "reasons": reasons}


def _summary(rows: Sequence[Row], count: int) -> str:
    words = Counter(word for row in rows for word in row.cells.values())
    said = ", ".join(f"{number} {word}" for word, number in words.items())
    some = "" if len(rows) == count else f" of {count}"
    return f"{len(rows)}{some} architectures, {sum(words.values())} tries: {said}."


if __name__ == "__main__":
    sys.exit(main())
