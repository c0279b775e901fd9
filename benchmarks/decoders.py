"""Measure the memory of joint selection on a decoder by phase, for two batch sizes, in memory and spilled to disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from measure import Outcome, Target

from spectrim.report.table import Column, Table

PHASES = ("moments", "decompose", "gates", "build")
COLUMNS = (
    Column("batch", "sequences a batch", 0),
    Column("at_once", "layers at once"),
    *(Column(phase, phase, 2) for phase in PHASES),
    Column("peak", "peak, times the model", 2),
    Column("seconds", "s", 0),
)
SPILLED = 1000  # layers at once: more than there are, so that decompositions are spilled and no pass is added
PRINTED = {None: "all", SPILLED: "all, spilled"}
CASES = ((8, None), (1, None), (1, SPILLED), (1, 14))  # sequences a batch, layers at once
BOUND = 2.5


def benchmark(quick: bool) -> Outcome:
    """Measure joint selection, whitened on both sides with pivoted factors, on a small decoder."""
    shapes, cases = ((1, 96, 256, 500), CASES[1:3]) if quick else ((6, 288, 768, 8192), CASES)
    rows = [_measured(batch, at_once, shapes) for batch, at_once in cases]
    least = min(rows, key=lambda row: row["peak"])
    target = Target("least peak memory over the model", least["peak"], BOUND, at_least=False)
    depth, width, inner, vocabulary = shapes
    notes = [
        target.line(),
        f"A decoder of {depth} blocks of width {width} and {inner}, {vocabulary} tokens, random weights in float32, "
        "tied head; 8 sequences of 128 tokens; four fifths of the parameters. Spilled: decompositions lie on disk.",
        "Resident memory of a process in each phase, less what it holds after a tiny selection, over the size of the "
        "model. Moments: of inputs and of gradients at outputs; gates: the expansion of the loss; build: the rest.",
    ]
    settings = {"quick": quick, "shapes": shapes, "cases": [list(case) for case in cases]}
    caption = "Peak memory of joint selection on a decoder, by phase"
    return Outcome(Table("decoders", pd.DataFrame(rows), COLUMNS, caption, notes), [target], settings, "random tokens")


def _measured(batch: int, at_once: int | None, shapes: tuple[int, ...]) -> dict[str, Any]:
    script = str(Path(__file__).with_name("decoder_process.py"))
    command = [sys.executable, script, json.dumps([batch, at_once, *shapes])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"batches of {batch}: {done.stderr.strip().splitlines()[-1]}")
    return {"batch": batch, "at_once": PRINTED.get(at_once, str(at_once)), **json.loads(done.stdout.splitlines()[-1])}
