"""Time a sweep of ranks in one process, as the command line runs it, to see how much is not evaluation."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from measure import Outcome, Target, clocked, seconds

from spectrim.algorithms.shared import compressed
from spectrim.cli import commands
from spectrim.decomposers.svd import SVD
from spectrim.report.table import Column, Table
from spectrim.statistics.objective import Objective

COLUMNS = (
    Column("part", "part"),
    Column("calls", "calls", 0),
    Column("seconds", "s", 3),
    Column("share", "share %", 2, scale=100),
)


def benchmark(quick: bool) -> Outcome:
    """Time ``spectrim -m model=resnet20 algorithm=truncation algorithm.rank=1,2,…,20`` as a whole."""
    model, data, ranks = ("resnet20", "digits", 3) if quick else ("resnet20", "cifar10", 20)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"model={model}",
            f"data={data}",
            "checkpoint=null",
            "algorithm=truncation",
            f"algorithm.rank={','.join(map(str, range(1, ranks + 1)))}",
            "algorithm.ratio=null",
            "name=sweep",
            f"records={folder}/records",
            f"hydra.sweep.dir={folder}/hydra",
        ]
        with (
            clocked(Objective, "evaluate") as evaluations,
            clocked(Objective, "gradients") as gradients,
            clocked(SVD, "spectrum") as decompositions,
            clocked(compressed, "model_cost") as countings,
        ):
            total = seconds(lambda: _command(["-m", *overrides]))
        records = [json.loads(path.read_text()) for path in Path(folder, "records", "sweep").glob("*.json")]
    table = _parts(total, records, evaluations, gradients, decompositions, countings)
    share = 1 - sum(evaluations) / total
    target = Target(
        f"not evaluation, in a sweep of {ranks} ranks of {model}", 100 * share, 10, at_least=False, unit="%"
    )
    samples = records[0]["dense"]
    notes = [
        target.line(),
        f"{model}, untrained, on {data}: evaluated on {samples['calibration']['n']} calibration and "
        f"{samples['test']['n']} test images, {len(records)} runs and once dense. One sweep, not repeated: its runs "
        "are the repeats. Counted: all from composing the first configuration to the last record, imports "
        "made on the way too; not counted: starting Python and importing the command.",
    ]
    settings = {"quick": quick, "overrides": [text for text in overrides if folder not in text], "runs": len(records)}
    caption = f"Where the time of a sweep of {ranks} ranks goes"
    digest = records[0]["provenance"]["data_digest"]
    return Outcome(Table("sweep", table, COLUMNS, caption, notes), [target], settings, digest)


def _command(arguments: Sequence[str]) -> None:
    """Run the command ``spectrim`` in this process."""
    typed, sys.argv = sys.argv, ["spectrim", *arguments]
    try:
        commands.compress()
    finally:
        sys.argv = typed


def _parts(
    total: float,
    records: Sequence[dict[str, Any]],
    evaluations: Sequence[float],
    gradients: Sequence[float],
    decompositions: Sequence[float],
    countings: Sequence[float],
) -> pd.DataFrame:
    """Return disjoint parts of ``total`` seconds, from the clocks and from the phases in the records."""
    phase = {
        name: sum(record["phases"][name]["seconds"] for record in records) for name in ("load", "select", "evaluate")
    }
    runs = len(records)
    rows = [
        ("evaluation", len(evaluations), sum(evaluations)),
        ("loading data and model", runs, phase["load"] + phase["evaluate"] - sum(evaluations) - sum(countings)),
        ("gradient pass, for the predictions", len(gradients), sum(gradients)),
        ("decompositions", len(decompositions), sum(decompositions)),
        ("cutting, curves, report", runs, phase["select"] - sum(gradients) - sum(decompositions)),
        ("counting MACs", len(countings), sum(countings)),
        ("configuration, provenance, record", runs, total - sum(phase.values())),
        ("whole sweep", 1, total),
    ]
    frame = pd.DataFrame(rows, columns=["part", "calls", "seconds"])
    return frame.assign(share=frame["seconds"] / total)
