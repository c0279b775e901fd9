"""Table 8: the bounds of Theorems 1 and 2 of S2 beside measurements, and rank selection by either."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records.records import Record, algorithm_of, name_of
from spectrim.report import averages, command, compare, trainings
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

BOUNDS = (
    Column("net", "net"),
    Column("depth", "depth", 0),
    Column("ratio", "rank, % of full", 0, scale=100),
    Column("measured", "largest ‖ΔX‖", 3),
    Column("bound", "its bound (Theorem 1)", 1),
    Column("tightness", "measured / bound %", 2, scale=100),
    Column("loss_change", "Δ loss", 4, signed=True),
    Column("loss_bound", "its bound (Theorem 2)", 1),
    Column("n", "n"),
)
SELECTION = (
    Column("depth", "depth", 0),
    Column("epsilon", "ε", 2),
    Column("delta_theory", "1e6 × δ of Theorem 2", 2, scale=1e6),
    Column("delta_bisect", "δ by bisection", 3),
    Column("rank_theory", "ranks kept %, theory", 2, scale=100),
    Column("rank_bisect", "ranks kept %, bisection", 2, scale=100),
    Column("kept_theory", "params kept %, theory", 1, scale=100),
    Column("kept_bisect", "params kept %, bisection", 1, scale=100),
    Column("change_bisect", "Δ loss, bisection", 4, signed=True),
    Column("test_bisect", "Δ test loss, bisection", 4, signed=True),
    Column("needed", "ε at which Theorem 2 grants the δ of bisection", 0),
    Column("n", "n"),
)
BOUNDS_PAPER = ("net", "depth", "ratio", "measured", "bound", "tightness")
SELECTION_PAPER = ("depth", "epsilon", "delta_theory", "delta_bisect", "kept_theory", "kept_bisect")
BOUND_NOTES = (
    "The networks are multilayer perceptrons with ReLU and without biases; depth counts their linear layers. Every "
    "layer is cut to the same share of its full rank. ‖ΔX‖ is the 2-norm of the change of an image's logits; the "
    "largest over the calibration images is shown. Δ loss is the change of the mean cross-entropy, whose bound is √2 "
    "times that of ‖ΔX‖.",
    averages.NOTE,
)
SELECTION_NOTES = (
    "The networks are the trained ones. A layer keeps the components with σ/σ₁ ≥ δ; ranks kept is their share. It "
    "stays dense if their number is above break-even. Params kept counts the whole model. Δ loss is that of the "
    "calibration images, on which both choose; both promise |Δ loss| < ε there. The δ of Theorem 2 is proportional to "
    "ε, so the last column is ε × δ by bisection / δ of Theorem 2, in nats.",
    averages.NOTE,
)
SOURCE = (
    "S2: Theorem 1 bounds the outputs under truncation. Theorem 2 gives the δ that keeps the cross-entropy within ε."
)


def build(options: Options) -> list[Path]:
    """Build the table of the bounds beside the measurements, and the table of rank selection by either."""
    found = command.load(options)
    moves, pairs = _moves(found), _pairs(found)
    tables: list[Table] = []
    if not moves.empty:
        rows = averages.over_seeds(moves, ("net", "depth", "ratio"), _values(BOUNDS, moves))
        caption = "Change of outputs and loss under truncation, and its bounds by S2's theorems, on digits"
        notes = [*BOUND_NOTES, _theorems(moves), SOURCE]
        table = Table(options.name, rows, BOUNDS, caption, notes, group="net")
        tables += [table, table.paper(BOUNDS_PAPER)]
    if not pairs.empty:
        rows = averages.over_seeds(pairs, ("depth", "epsilon"), _values(SELECTION, pairs))
        caption = "Rank selection by the δ of Theorem 2 and by bisection, at the same ε, on digits"
        notes = [*SELECTION_NOTES, _promise(pairs), SOURCE]
        table = Table(f"{options.name}_selection", rows, SELECTION, caption, notes, group="depth")
        tables += [table, table.paper(SELECTION_PAPER)]
    if not tables:
        raise command.lacking(options, "bound_probe with a bound, or rank_selection by theory and by bisection")
    return save(tables, options.out, command.origin(options, found))


def _values(columns: Sequence[Column], rows: pd.DataFrame) -> list[str]:
    """Return the columns to average over the seeds: those that hold numbers and do not name a row."""
    names = ("net", "depth", "ratio", "epsilon")
    return [column.key for column in columns if column.key in rows and column.key not in names]


def _of(found: Sequence[Record], algorithm: str) -> list[Record]:
    return [record for record in found if algorithm_of(record) == algorithm]


def _about(record: Record) -> dict[str, Any]:
    return {
        "net": "untrained" if trainings.from_scratch(record) else "trained",
        "depth": record["config"]["model"]["depth"],
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
    }


def _moves(found: Sequence[Record]) -> pd.DataFrame:
    """Return one row per network and ratio: what a probe measured, if there is a bound."""
    rows = [
        _about(record) | {"record": name_of(record)} | entry | {"tightness": entry["measured"] / entry["bound"]}
        for record in _of(found, "boundprobe")
        for entry in record["log"]
        if entry["bound"]
    ]
    return pd.DataFrame(rows).sort_values(["net", "depth", "ratio", "seed"]) if rows else pd.DataFrame()


def _pairs(found: Sequence[Record]) -> pd.DataFrame:
    """Return one row per network and epsilon for which selection by theory and by bisection were both run."""
    runs: dict[tuple, dict[str, Record]] = {}
    for record in _of(found, "rankselection"):
        about, settings = _about(record), record["config"]["algorithm"]
        runs.setdefault((*about.values(), settings["epsilon"]), {})[settings["delta"]] = record
    rows = []
    for (*_, epsilon), pair in sorted(runs.items(), key=lambda run: run[0]):
        if pair.keys() != {"theory", "bisect"}:
            continue
        row = _about(pair["theory"]) | {"epsilon": epsilon, "record": " ".join(map(name_of, pair.values()))}
        for how, record in pair.items():
            small, dense = record["compressed"], record["dense"]
            chosen = max((step for step in record["log"] if step["passed"]), key=lambda step: step["delta"])
            row |= {
                f"delta_{how}": chosen["delta"],
                f"rank_{how}": chosen["rank_kept"],
                f"kept_{how}": small["params"] / dense["params"],
                f"change_{how}": small["calibration"]["loss"] - dense["calibration"]["loss"],
                f"test_{how}": small["test"]["loss"] - dense["test"]["loss"],
            }
        rows.append(row | {"needed": epsilon * row["delta_bisect"] / row["delta_theory"]})
    return pd.DataFrame(rows)


def _theorems(moves: pd.DataFrame) -> str:
    """Judge whether every output and loss moved by at most its bound."""
    beyond = (moves["tightness"] > 1) | (moves["loss_change"].abs() > moves["loss_bound"])
    why = (
        f"{int(beyond.sum())} of {len(moves)} truncations moved outputs or loss further than their bound; the outputs "
        f"came to between {100 * moves['tightness'].min():.2g} and {100 * moves['tightness'].max():.2g} % of it"
    )
    return f"Theorems 1 and 2: {compare.judged(not beyond.any(), why)}."


def _promise(pairs: pd.DataFrame) -> str:
    """Judge whether the loss stayed within epsilon at the delta of Theorem 2, and count the runs that it left whole."""
    kept = pairs["change_theory"].abs() < pairs["epsilon"]
    idle = int((pairs["rank_theory"] == 1).sum())
    why = f"{int(kept.sum())} of {len(pairs)} runs; in {idle} of them that δ drops no component"
    return f"|Δ loss| < ε at the δ of Theorem 2: {compare.judged(bool(kept.all()), why)}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table8", "table8", arguments)


if __name__ == "__main__":
    sys.exit(main())
