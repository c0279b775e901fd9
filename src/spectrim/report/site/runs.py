"""Describe one run for its page of the report: numbers, ranks, settings, and the command that repeats it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.records.records import Record, name_of
from spectrim.report import frame
from spectrim.report.table import ABSENT, number

STEPS = 60  # lines of a log that a page shows
# In pixels of the picture of the ranks: widths of a name, of a whole bar and of the numbers, and height of a layer.
NAME, BAR, NUMBERS, LINE = 150, 160, 90, 16


def described(record: Record) -> dict[str, Any]:
    """Return what the page of a run shows, as the template ``run.html`` names it."""
    names, layers = record["names"], record.get("layers", [])
    return {
        "name": name_of(record),
        "title": f"{names['algorithm']} on {names['model']}, {names['data']}",
        "seeds": f"training seed {record['seed']}, calibration seed {record.get('calibration_seed', ABSENT)}",
        "command": record["provenance"]["command"],
        "numbers": measured(record),
        "predicted": predicted(record),
        "bars": [bar(layer) for layer in layers],
        "picture": {
            "width": NAME + BAR + NUMBERS,
            "height": LINE * len(layers),
            "left": NAME,
            "bar": BAR,
            "line": LINE,
        },
        "layers": layers,
        "log": steps(record.get("log", [])),
        "settings": frame.flat(record["config"]),
        "origin": frame.flat({key: value for key, value in record["provenance"].items() if key != "command"}),
        "notes": record.get("notes", []),
    }


def measured(record: Record) -> list[tuple[str, str, str, str]]:
    """Return one row per measured number: what it is, of the dense model, of the compressed one, and the change."""
    dense, small = record["dense"], record["compressed"]
    rows = []
    for key, said in (("params", "parameters"), ("macs", "MACs")):
        kept = 100 * small[key] / dense[key]
        rows.append((said, f"{dense[key]:,}", f"{small[key]:,}", f"{kept:.1f} % kept"))
    for split in ("test", "calibration"):
        before, after = dense[split], small[split]
        change = number(after["loss"] - before["loss"], 4, True)
        rows.append((f"{split} loss (nats)", number(before["loss"], 4), number(after["loss"], 4), change))
        if before["accuracy"] is not None:
            first, last = 100 * before["accuracy"], 100 * after["accuracy"]
            rows.append((f"{split} top-1 (%)", number(first, 2), number(last, 2), number(last - first, 2, True)))
    return rows


def predicted(record: Record) -> tuple[str, str] | None:
    """Return the predicted and the measured change of the calibration loss; None where nothing was predicted."""
    said = record.get("predicted_change")
    if said is None or not record.get("layers"):
        return None
    change = record["compressed"]["calibration"]["loss"] - record["dense"]["calibration"]["loss"]
    return number(said, 4, True), number(change, 4, True)


def bar(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bar of a layer in the picture: the part of the full rank that is kept, and the break-even rank."""
    full = max(layer["full_rank"], 1)
    rank = layer["rank"]
    return {
        "layer": layer["layer"],
        "dense": rank is None,
        "kept": BAR if rank is None else round(BAR * min(rank / full, 1.0), 1),
        "even": round(BAR * min(layer["break_even"] / full, 1.0), 1),
        "said": f"dense ({full})" if rank is None else f"{rank} of {full}",
    }


def steps(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first lines of a log: the columns that hold one value per step, and how many lines are left out."""
    keys = list(dict.fromkeys(key for step in log for key, value in step.items() if not isinstance(value, list | dict)))
    rows = [[_said(step.get(key)) for key in keys] for step in log[:STEPS]]
    return {"keys": keys, "rows": rows, "left": max(len(log) - STEPS, 0)}


def _said(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    return f"{value:.6g}" if isinstance(value, float) else str(value)
