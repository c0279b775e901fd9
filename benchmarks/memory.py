"""Measure the memory of a compression: the peak of a fresh process over the size of the model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from measure import Outcome, Target

from spectrim.report.table import Column, Table

COLUMNS = (
    Column("method", "method"),
    Column("at_once", "layers at once"),
    Column("loaded", "loaded, times the model", 2),
    Column("peak", "peak, times the model", 2),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("seconds", "s", 0),
)
METHODS = ("truncation", "truncation, whitened", "lossless", "joint")
BLOCK = 8
BOUND = 2.5


def benchmark(quick: bool) -> Outcome:
    """Measure each method on a decoder with the shapes of SmolLM2-135M, ``BLOCK`` layers at once."""
    shapes, methods = ((2, 96, 256, 500), METHODS[:1]) if quick else ((30, 576, 1536, 49152), METHODS)
    rows = []
    for method, at_once in [(METHODS[0], None), *((method, BLOCK) for method in methods)]:
        found = _measured(method, at_once, shapes)
        rows.append({"method": method, "at_once": "all" if at_once is None else str(at_once), **found})
    worst = max((row for row in rows if row["at_once"] != "all"), key=lambda row: row["peak"])
    what = f"peak memory over the model with {BLOCK} layers at once ({worst['method']})"
    target = Target(what, worst["peak"], BOUND, at_least=False)
    depth, width, inner, vocabulary = shapes
    notes = [
        target.line(),
        f"A decoder of {depth} blocks of width {width} and {inner}, {vocabulary} tokens, random weights in float32, "
        "tied head; 8 sequences of 128 tokens, one a batch; four fifths of the parameters, but for lossless, which "
        "chooses. Resident memory of a fresh process, less what its imports take; loaded: before the compression.",
    ]
    settings = {"quick": quick, "shapes": shapes, "block": BLOCK}
    caption = "Peak memory of compressing a language model"
    return Outcome(Table("memory", pd.DataFrame(rows), COLUMNS, caption, notes), [target], settings, "random tokens")


def _measured(method: str, at_once: int | None, shapes: tuple[int, ...]) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).with_name("memory_process.py")),
        method,
        json.dumps([at_once, *shapes]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
