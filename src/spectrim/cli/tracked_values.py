"""What trackers are told of a recorded run or training. It comes from the record alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from spectrim.records.provenance import git_state
from spectrim.runs.tracking.session import About, Results


def about(names: Mapping[str, str], group: str, signature: str, config: Mapping[str, Any]) -> About:
    """Return what is known of a run, or of a training, before it begins.

    ``names``: of model, data, decomposer and algorithm; a training has the first two.
    ``group``: the folder of the records.
    ``config``: the settings that are signed.
    """
    commit, dirty = git_state()
    kind = names.get("algorithm", "training")
    settings = {**config, "names": dict(names), "signature": signature, "commit": commit, "dirty": dirty}
    name = f"{names['model']}-{names['data']}-{kind}-{signature[:6]}"
    return About(signature, name, group, kind, (group, *names.values()), settings)


def of_run(record: Mapping[str, Any]) -> Results:
    """Return the results of a run."""
    dense, small = record["dense"], record["compressed"]
    summary: dict[str, Any] = {
        "params_kept": small["params"] / dense["params"],
        "macs_kept": small["macs"] / dense["macs"],
        "predicted_change": record["predicted_change"],
    }
    for split in ("test", "calibration"):
        for measure in ("loss", "accuracy"):
            if dense[split][measure] is not None:
                before, after = dense[split][measure], small[split][measure]
                summary |= {f"{split}/{measure}": after, f"{split}/{measure}_dense": before}
                summary[f"{split}/{measure}_change"] = after - before
    found = record.get("verification", {})  # of a run that a search asked for
    summary |= {f"verification/{name}": found[name] for name in ("loss", "accuracy") if found.get(name) is not None}
    for name, phase in record["phases"].items():
        summary |= {f"phases/{name}/{unit}": value for unit, value in phase.items()}
    summary |= {f"samples_read/{split}": count for split, count in record["samples_read"].items()}
    tables = {name: pd.DataFrame(rows) for name, rows in _within(record["log"]).items()}
    if record["layers"]:  # a measurement has none
        tables["layers"] = pd.DataFrame(record["layers"]).astype({"shape": str, "rank": "Int64"})
    plan = {"plan.json": _encoded(record["plan"])} if record["plan"] else {}
    return Results(record["log"], summary | _origin(record), tables, {"record.json": _encoded(record), **plan})


def of_training(record: Mapping[str, Any]) -> Results:
    """Return the results of a training."""
    summary = {"params": record["params"], "seconds": record["seconds"]}
    for split in ("test", "calibration"):
        found = {f"{split}/{measure}": record[split][measure] for measure in ("loss", "accuracy")}
        summary |= {name: value for name, value in found.items() if value is not None}
    return Results(record["curve"], summary | _origin(record), {}, {"record.json": _encoded(record)})


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record["provenance"][key] for key in ("command", "commit", "dirty")}


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _within(log: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables within a log, such as the bisection of each epoch: its rows, with their step."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for step, entry in enumerate(log):
        for name, rows in entry.items():
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                tables.setdefault(name, []).extend({"step": step, **row} for row in rows)
    return {name: rows for name, rows in tables.items() if rows}
