"""Convert records to a DataFrame with one row per run, and average runs over seeds.

Losses are in nats, accuracies and shares in [0, 1], changes of accuracy in percentage points (``_pp``), times in
seconds. A change is always compressed minus dense, so a negative change of loss is an improvement.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.records import Record

FAMILIES = ("resnet", "resnext", "densenet", "vgg")
METHODS = ("dense", "truncation", "lossless", "compact")
# Printed names of the selectors with a budget, by class name in lower case.
SELECTORS = {
    "truncation": "uniform truncation",
    "globalthreshold": "global threshold",
    "alds": "ALDS",
    "aimet": "AIMET, greedy",
    "sensitivity": "sensitivity (ASVD)",
    "knapsack": "knapsack (BALF)",
    "joint": "joint, ours",
}
# Runs of one setting may differ in these keys only.
SEEDS = ("seed", "checkpoint", "data.calibration_seed")


def runs(found: Iterable[Record]) -> pd.DataFrame:
    """Return one row per run, ordered by model and method.

    Column ``variant``: the algorithm and its main setting.
    Column ``method``: the variant, and the settings that differ between runs of one model.
    Column ``group``: equal for runs that differ only in their seeds.
    Column ``settings``: the flat configuration.
    Raises ``UserError`` where records of one model, data set and seed come from different checkpoints.
    """
    frame = pd.DataFrame([_row(record) for record in found])
    if frame.empty:
        return frame
    _one_checkpoint_a_seed(frame)
    frame["method"] = _methods(frame)
    return frame.sort_values(by=["model", "variant", "method", "first_signature"], key=_order).reset_index(drop=True)


def _row(record: Record) -> dict[str, Any]:
    config, dense, compressed = record["config"], record["dense"], record["compressed"]
    settings = flat(records.LATE["run"]) | flat({key: value for key, value in config.items() if key != "shape"})
    algorithm = records.class_of(config["algorithm"]).lower()
    row: dict[str, Any] = {
        "signature": record["signature"],
        "first_signature": records.first_signature(record),
        "experiment": record["experiment"],
        "model": _model(record),
        "data": record["names"]["data"],
        "algorithm": algorithm,
        "decomposer": record["names"].get("decomposer", ""),
        "variant": _variant(algorithm, config["algorithm"]),
        "group": records.signature({key: value for key, value in settings.items() if key not in SEEDS}),
        "settings": settings,
        "seed": record["seed"],
        "calibration_seed": record.get("calibration_seed"),
        "calibration_from": settings.get("data.calibration_from", "held_out"),
        "ratio": settings.get("algorithm.ratio"),
        "params_kept": compressed["params"] / dense["params"],
        "macs_kept": compressed["macs"] / dense["macs"],
        "predicted_change": record.get("predicted_change"),
        "relative_error": _relative_error(record.get("layers", [])),
        "layers_kept": _layers_kept(record.get("layers", [])),
        "factored_layers": len(record.get("plan", {})),
        "seconds": sum(phase["seconds"] for phase in record.get("phases", {}).values()),
        "checkpoint_digest": record["provenance"].get("checkpoint_digest"),
    }
    for split in ("calibration", "test"):
        before, after = dense[split], compressed[split]
        # A task without classes has no accuracy.
        right, right_before = (math.nan if one["accuracy"] is None else one["accuracy"] for one in (after, before))
        row |= {
            f"{split}_loss": after["loss"],
            f"{split}_accuracy": right,
            f"dense_{split}_loss": before["loss"],
            f"dense_{split}_accuracy": right_before,
            f"change_{split}_loss": after["loss"] - before["loss"],
            f"change_{split}_accuracy_pp": 100 * (right - right_before),
        }
    return row


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration: ``{"data": {"size": 1}}`` → ``{"data.size": 1}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _model(record: Record) -> str:
    """Return the model's option, or its own name for torchvision classifiers, which share one option."""
    return str(record["config"]["model"].get("name") or record["names"]["model"])


def _variant(algorithm: str, settings: Mapping[str, Any]) -> str:
    if algorithm == "truncation":
        given = {
            key: settings[key] for key in ("rank", "ratio", "energy", "params_kept") if settings.get(key) is not None
        }
        return ", ".join([algorithm, *(f"{key.replace('_', ' ')} {value:g}" for key, value in given.items())])
    if algorithm == "refitted":
        selector = settings["selector"]
        return f"{_variant(records.class_of(selector).lower(), selector)}, {algorithm}"
    if "verified" in settings:
        return f"{algorithm}, {'verified' if settings['verified'] else 'one-shot'}"
    return algorithm


def _relative_error(layers: Sequence[Mapping[str, Any]]) -> float:
    """Return the root mean square of ‖δ‖/‖W‖ (Frobenius) over the factorable layers; a layer left dense counts as 0."""
    squares = [(layer["relative_error"] or 0.0) ** 2 for layer in layers]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def _layers_kept(layers: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of parameters that the factorable layers keep: rank over break-even rank, weighted by size."""
    before = sum(layer["params_before"] for layer in layers)
    return sum(layer["params_after"] for layer in layers) / before if before else math.nan


def _one_checkpoint_a_seed(frame: pd.DataFrame) -> None:
    for (model, data, seed), rows in frame.groupby(["model", "data", "seed"]):
        if rows["checkpoint_digest"].nunique(dropna=False) > 1:
            raise UserError(
                f"records of {model} on {data}, seed {seed}, come from different checkpoints: delete the older records"
            )


def _methods(frame: pd.DataFrame) -> list[str]:
    """Return each run's ``variant``, plus the settings that differ if one model has several settings of it."""
    names = list(frame["variant"])
    for _, rows in frame.groupby(["experiment", "model", "data", "variant"]):
        if rows["group"].nunique() < 2:
            continue
        keys = sorted({key for settings in rows["settings"] for key in settings} - set(SEEDS))
        values = {key: [settings.get(key) for settings in rows["settings"]] for key in keys}
        differing = [key for key in keys if any(value != values[key][0] for value in values[key])]
        for index in rows.index:
            settings = frame["settings"][index]
            said = [_said(key.rpartition(".")[2], settings.get(key)) for key in differing]
            names[int(index)] = ", ".join([names[int(index)], *said])
    return names


def _said(setting: str, value: Any) -> str:
    if setting == records.CLASS:  # The class name alone is clear, such as that of a decomposer.
        return str(value)
    name = setting.replace("_", " ")
    return f"no {name}" if value is None else f"{name} {value}"


def require_one_setting(runs: pd.DataFrame, by: Sequence[str], named: str, place: str) -> None:
    """Raise ``UserError`` where runs of different settings would share one row or curve.

    ``by``: columns that group the runs.
    ``named``: format string over the columns that names a group in the message.
    ``place``: the part of the message that says what holds only one setting.
    """
    for _, own in runs.groupby(list(by)):
        count = own["group"].nunique()
        if count > 1:
            said = f"{count} settings of {named.format_map(own.iloc[0].to_dict())}"
            raise UserError(f"the records hold {said}: {place} for them; delete the older records")


def family(model: str) -> str:
    """Return the leading letters of a model's name: resnet20 and ResNet-50 → resnet."""
    found = re.match("[a-z]+", model.lower())
    return found.group() if found else ""


def missing(models: Iterable[str], families: Sequence[str] = FAMILIES) -> list[str]:
    """Return a note that lists the families without a model, or no note if every family has one."""
    present = {family(model) for model in models}
    absent = [name for name in families if name not in present]
    return [f"Left out, for want of records: {', '.join(absent)}."] if absent else []


def sort_key(name: str) -> tuple[Any, ...]:
    """Return a sort key for model and method names.

    Known families and methods come first, in their usual order. Numbers inside names compare as numbers
    (resnet20 < resnet110). One-shot comes before verified, and large truncation shares before small ones.
    """
    known = FAMILIES + METHODS
    place = known.index(family(name)) if family(name) in known else len(known)
    form = 0 if "one-shot" in name else 1
    parts = re.findall(r"\d+\.?\d*|\D+", name)
    sign = -1 if name.startswith("truncation") else 1
    return place, form, [(1, "", sign * float(part)) if part[0].isdigit() else (0, part, 0.0) for part in parts]


def _order(column: "pd.Series[Any]") -> "pd.Series[int]":
    rank = {name: index for index, name in enumerate(sorted(set(column), key=sort_key))}
    return column.map(rank)


def with_dense(frame: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    """Average runs over seeds: one row per model and method, each model's dense row first.

    The columns are those of ``over_seeds``. A dense network does not depend on the calibration draw, so its row has one
    run per training seed. If there are several data sets, the model's name states its data set.
    """
    if frame["data"].nunique() > 1:
        frame = frame.assign(model=frame["model"] + " on " + frame["data"])
    by = ("model", "data", "method", "variant")
    dense = frame.drop_duplicates(["model", "data", "seed"]).assign(
        method="dense", variant="dense", calibration_seed=None, params_kept=1.0, macs_kept=1.0, layers_kept=1.0
    )
    for split in ("calibration", "test"):
        for metric in ("loss", "accuracy"):
            dense[f"{split}_{metric}"] = dense[f"dense_{split}_{metric}"]
    absent = [value for value in values if value.startswith(("change_", "predicted", "relative"))]
    dense[absent] = math.nan
    rows = []
    for (model, data), own in frame.groupby(["model", "data"], sort=False):
        rows += over_seeds(dense[(dense["model"] == model) & (dense["data"] == data)], by, values).to_dict(
            orient="records"
        )
        rows += over_seeds(own, by, values).to_dict(orient="records")
    found = pd.DataFrame(rows)
    # Shares kept are 1 by definition for a dense network, so they have no deviation.
    shares = [f"{value}_std" for value in values if value.endswith("_kept")]
    found.loc[found["method"] == "dense", shares] = math.nan
    return found


def over_seeds(frame: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Return the mean and standard deviation of each value over the runs of a group, with ``n``.

    The standard deviation has ddof = 1 and is NaN for a single run. Rows keep the order in which the groups first
    appear. The columns are ``by``, each value and its ``_std``, ``runs`` (number of runs), and ``n`` (see
    ``spelled_n``).
    """
    rows = []
    for keys, group in frame.groupby(list(by), sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, keys, strict=True))
        for value in values:
            numbers = group[value].astype(float)
            row[value] = float(numbers.mean())
            row[f"{value}_std"] = float(numbers.std(ddof=1)) if numbers.count() > 1 else math.nan
        row |= {"runs": len(group), "n": spelled_n(group)}
        rows.append(row)
    return pd.DataFrame(rows)


def spelled_n(group: pd.DataFrame) -> str:
    """Describe the seeds of a group of runs.

    ``3 × 2`` means three training seeds and two calibration seeds; the number of runs follows if it is not their
    product. ``3`` means that the runs use no calibration, as for a dense network. ``3 pairs`` means that each training
    seed has its own calibration draw.
    """
    seeds, draws, total = group["seed"].nunique(), group["calibration_seed"].nunique(), len(group)
    if not draws:
        return str(seeds)
    if seeds == draws == total > 1:
        return f"{total} pairs"
    return f"{seeds} × {draws}" + ("" if total == seeds * draws else f" ({total} runs)")
