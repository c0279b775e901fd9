"""Table 6: the cost of a selection in seconds, samples read and memory, and how it grows."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records import records
from spectrim.records.records import Record
from spectrim.report import averages, claims, command, compare, frame, trainings
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, number, save

PUBLISHED = Path(__file__).with_name("published.csv")
SEARCHES = ("aimet", "sensitivity")
SEARCHED = "resnet20"  # the network of their grids that the index gives to this table
CHOOSING = ("lossless", "compact", "rankselection")  # selectors that choose the size by the loss
KEYS = ("algorithm", "mode")
# The largest ratio of CPU seconds, joint selection over each rival, that this project aims at.
AIMS = {"aimet": 0.1, "sensitivity": None, "knapsack": 2.0}
SIZES = {"layers": "layers", "width": "width", "images": "calibration images"}
VALUES = ("params_kept", "seconds", "cpu_seconds", "read", "passes", "peak_mib", "added_mib")
COSTS = (
    Column("seconds", "seconds", 1),
    Column("cpu_seconds", "CPU seconds", 1),
    Column("read", "images read", 0),
    Column("passes", "passes over the calibration images", 1),
    Column("peak_mib", "peak MiB", 0),
    Column("added_mib", "added MiB", 0),
)
COLUMNS = (
    Column("model", "model"),
    Column("layers", "layers", 0),
    Column("images", "calibration images", 0),
    Column("selector", "selector"),
    Column("decomposer", "decomposition"),
    Column("params_kept", "params kept %", 1, scale=100),
    *COSTS,
    Column("n", "n"),
)
GROWTH = (
    Column("along", "growing with"),
    Column("selector", "selector"),
    Column("sizes", "from, to"),
    Column("first", "CPU seconds at first", 2),
    Column("last", "at last", 2),
    Column("times", "times", 1),
    Column("exponent", "exponent", 2),
    Column("read_times", "images read, times", 1),
    Column("added_times", "added MiB, times", 1),
    Column("n", "n"),
)
PAPER = ("model", "selector", "params_kept", "cpu_seconds", "read", "added_mib")
GROWTH_PAPER = ("along", "selector", "sizes", "times", "exponent", "read_times")
NOTES = (
    averages.NOTE,
    "Seconds are those of the selection, with decomposition and cut. Loading, evaluation and the report are not "
    "counted. CPU seconds add up all threads, so other work on the machine changes them least. The provenance names "
    "the machine. Params kept counts the whole model. Lossless, compact and rank selection choose their size "
    "themselves.",
    "Images read include calibration, verification and training images, each as often as it was read. A pass for a "
    "loss, for gradients or for the inputs of the layers counts once. Passes that only the report needs are not "
    "counted.",
    "AIMET and sensitivity are the runs of Figure 4. Their search is the same for every size, so the run of each seed "
    "that made the search is shown. They ran beside other work: compare CPU seconds.",
    "Peak is the resident memory of the whole process, with the report. Added is the peak above the memory at the "
    "start of the selection. Memory that an earlier run gave back may be used again without being seen.",
)
GROWTH_NOTES = (
    "The networks are untrained, and every selector uses one decomposition. Layers counts those that can be factored. "
    "The exponent is the slope of the least-squares line through log(seconds) over log(size); 1 means proportional. "
    "Joint selection reads all calibration images here.",
    "A selector that reads no images does not grow with them. For a layer of width W, MACs grow as W squared and the "
    "decomposition as W cubed.",
)


def build(options: Options) -> list[Path]:
    """Build the table of what each selector costs on one network, and the table of how that cost grows."""
    found = [*command.load(options), *_searches(options)]
    known = command.runs(options, found, [*frame.SELECTORS, *CHOOSING]).set_index("signature")
    runs = pd.DataFrame([_row(record, known) for record in found if record["signature"] in known.index])
    if runs["read"].isna().all():
        raise command.lacking(options, "a selector that tells how many samples it read")
    runs = runs.sort_values(["untrained", "model", "images", "place", "selector"], kind="stable")
    by = ("model", "data", "images", "selector", "decomposer", "layers", "width", "untrained", "place", *KEYS)
    rows = averages.over_seeds(runs, by, VALUES)
    published = claims.claims(compare.read_published(PUBLISHED), ["Table 6"])
    data = frame.data_of(rows)
    notes = [*NOTES, *_searched(rows), *(_claim(one, rows) for one in published)]
    caption = f"Cost of a selection, on {data}"
    tables = [Table(options.name, rows, COLUMNS, caption, notes, group="model", hidden=KEYS)]
    tables.append(tables[0].paper(PAPER))
    growth = pd.DataFrame([row for along in SIZES for row in _growth(rows[rows["untrained"]], along)])
    if len(growth):
        caption = f"Growth of the cost of a selection, on {data}"
        shown = Table(f"{options.name}_growth", growth, GROWTH, caption, GROWTH_NOTES, group="along")
        tables += [shown, shown.paper(GROWTH_PAPER)]
    return save(tables, options.out, command.origin(options, found, [PUBLISHED]))


def _searches(options: Options) -> list[Record]:
    """Return, for each seed of ``SEARCHED``, the run of Figure 4 that made the search for all sizes."""
    costliest: dict[tuple, Record] = {}
    for record in records.read_all(options.records, "figure4") if options.default else []:
        if record["names"]["model"] != SEARCHED:
            continue
        name = records.algorithm_of(record)
        key = name, frame.model_of(record), record["seed"], record["calibration_seed"]
        spent = record["phases"]["select"]["seconds"]
        if name in SEARCHES and (key not in costliest or spent > costliest[key]["phases"]["select"]["seconds"]):
            costliest[key] = record
    return list(costliest.values())


def _row(record: Record, known: pd.DataFrame) -> dict[str, Any]:
    run: Any = known.loc[record["signature"]]
    phase = record["phases"]["select"]
    images = record["config"]["data"]["calibration_size"]
    report = record.get("reporting", {})  # no selector needs it
    read = trainings.samples_read(record) - sum(report.get("samples_read", {}).values())
    order = [*frame.SELECTORS, *CHOOSING]
    return {
        "record": run["record"],
        "model": run["model"],
        "data": run["data"],
        "untrained": trainings.from_scratch(record),
        "layers": len(record["layers"]),
        "width": record["config"]["model"].get("width", math.nan),
        "images": images,
        "place": order.index(run["algorithm"]),
        **{key: run[key] for key in KEYS},
        "selector": frame.SELECTORS.get(run["algorithm"], run["variant"]),
        "decomposer": run["decomposer"],
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
        "params_kept": run["params_kept"],
        "seconds": phase["seconds"] - report.get("seconds", 0),
        "cpu_seconds": phase.get("cpu_seconds", math.nan) - report.get("cpu_seconds", 0),
        "read": read,
        "passes": read / images,
        "peak_mib": phase["peak_mib"],
        "added_mib": phase.get("added_mib", math.nan),
    }


def _growth(rows: pd.DataFrame, along: str) -> list[dict[str, Any]]:
    """Return, for each selector, how its cost grows from the smallest to the largest size ``along`` one axis.

    All other sizes are the same.
    """
    others = [size for size in SIZES if size != along]
    found = []
    for (selector, *_), own in rows.groupby(["selector", "decomposer", "data", *others], sort=False, dropna=False):
        own = own.dropna(subset=along).sort_values(along).drop_duplicates(along)
        if len(own) < 2 or (along == "images" and not own["read"].any()):  # a selector that reads none does not grow
            continue
        first, last = own.iloc[0], own.iloc[-1]
        found.append(
            {
                "along": SIZES[along],
                "selector": selector,
                "sizes": f"{first[along]:g}, {last[along]:g}",
                "first": first["cpu_seconds"],
                "first_std": first["cpu_seconds_std"],
                "last": last["cpu_seconds"],
                "last_std": last["cpu_seconds_std"],
                "times": _times(first["cpu_seconds"], last["cpu_seconds"]),
                "exponent": _exponent(own[along].tolist(), own["cpu_seconds"].tolist()),
                "read_times": _times(first["read"], last["read"]),
                "added_times": _times(first["added_mib"], last["added_mib"]),
                "n": last["n"],
                "records": averages.records_of(own["records"]),
            }
        )
    return found


def _times(first: float, last: float) -> float:
    return last / first if first > 0 else math.nan


def _exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of the least-squares line through log(seconds) over log(size)."""
    if not min(seconds) > 0:
        return math.nan
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True))
    return over / sum((one - mean_x) ** 2 for one in x)


def _searched(rows: pd.DataFrame) -> list[str]:
    """Return the cost of joint selection over its rivals', on trained networks, and whether it meets its aim.

    A rival that was run with several decompositions is compared at the same one.
    """
    said = []
    trained = rows[~rows["untrained"]]
    for (model, decomposer), ours in trained[trained["algorithm"] == "joint"].groupby(
        ["model", "decomposer"], sort=False
    ):
        own = trained[trained["model"] == model]
        alike = own[own["decomposer"] == decomposer]
        for rival, aim in AIMS.items():
            theirs = alike if (alike["algorithm"] == rival).any() else own
            times = _seconds(ours, "joint") / _seconds(theirs, rival)
            if not math.isnan(times):
                word = "" if aim is None else f" (aim: at most {aim:g}, {'met' if times <= aim else 'not met'})"
                named = f"{model}, {decomposer}: joint selection takes {number(times, 3)} times the CPU seconds of"
                said.append(f"{named} {frame.SELECTORS[rival]}{word}.")
    return said


def _claim(claim: claims.Claim, rows: pd.DataFrame) -> str:
    """Return S1b's ratio of costs, a search over its own selection, beside ours for compact selection."""
    minutes, search = claim.values["selection_minutes"], claim.values["svd_search_minutes"]
    trained = rows[~rows["untrained"]]
    times = _seconds(trained, "sensitivity") / _seconds(trained, "compact", "one-shot")
    here = "no run of ours" if math.isnan(times) else f"{number(times, 1)} times compact, one-shot"
    return (
        f"{claim.source}: {minutes:g} min against {search:g} min of a search over SVD ranks, "
        f"{number(search / minutes, 1)} times: not comparable: its model is not named. Sensitivity, a search over "
        f"ratios of each layer, costs here: {here}."
    )


def _seconds(rows: pd.DataFrame, algorithm: str, mode: str = "") -> float:
    """Return the CPU seconds in the first row of a selector; NaN if it has none."""
    own = rows.loc[(rows["algorithm"] == algorithm) & (rows["mode"] == mode), "cpu_seconds"]
    return float(own.iloc[0]) if len(own) and own.iloc[0] > 0 else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table6", "table6", arguments)


if __name__ == "__main__":
    sys.exit(main())
